// tcgen05 in software, for GPUs that do not have it. The semantics of each instruction, not its speed: every function
// is called by a whole warp and done by it. What programs get wrong unseen on the hardware traps here.
//
// Two schedules, by FLASH_MLA_EMULATION_LAZY. Eager: a product is computed where it is issued. Lazy: at the commit that
// covers it. A program that waits for what it should gets the same bits from both.
#pragma once

#define FLASH_MLA_EMULATED

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdint>
#include <cstdio>

#include "emulation/layouts.h"

namespace flash_mla::emulation {

#ifdef FLASH_MLA_EMULATION_LAZY
constexpr bool kLazy = true;
#else
constexpr bool kLazy = false;
#endif

constexpr int kLanes = 128, kColumns = 512, kSlice = 32;  // columns are allocated in slices
constexpr uint32_t kGaveUp = 1u << 31, kOfPair = 1u << 30;
constexpr int kMaxSms = 144, kWarpsOfSm = 64, kMaxOperations = 128, kMaxStores = 64, kCtas = 4096;
constexpr long long kPatience = 4'000'000'000;  // cycles that an allocation waits

enum CellState : uint8_t { kNever = 0, kWritten = 1, kBeingStored = 2 };

struct TensorMemory {
  uint32_t cells[kLanes][kColumns];
  uint8_t states[kLanes][kColumns];
  // The CTA that holds them, by its number from 1 on, kOfPair where its pair does, and kGaveUp once it will allocate no
  // more. Kernels may overlap, so only an SM's own memory says which CTA is meant.
  uint32_t owners[kColumns / kSlice];
  uint32_t lock;
};

struct Operation {
  uint64_t a, b;
  uint32_t d, instruction;
  bool a_in_tmem, accumulate;
  int ctas;
};

struct Store {
  int lane, lanes, column, columns;
};

struct WarpQueue {
  uint32_t cta;
  int num_operations, num_stores;
  Operation operations[kMaxOperations];  // lazy: all of them; eager: only their number is kept
  Store stores[kMaxStores];
};

static __device__ TensorMemory g_memory[kMaxSms];
static __device__ WarpQueue g_queues[kMaxSms][kWarpsOfSm];
static __device__ uint32_t g_sm_of_cta[kCtas];

#define EMULATION_CHECK(condition, what) assert((condition) && (what))

// ---- Who and where

__device__ inline int sm_number() {
  int sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  EMULATION_CHECK(sm < kMaxSms, "more SMs than the emulation knows");
  return sm;
}

__device__ inline int thread_in_cta() { return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z); }
__device__ inline int lane_id() { return thread_in_cta() % 32; }
__device__ inline int warp_in_cta() { return thread_in_cta() / 32; }

// From 1 on; `peer`: of the other CTA of the pair.
__device__ inline uint32_t cta_number(bool peer = false) {
  return 1 + (blockIdx.x ^ (peer ? 1 : 0)) + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
}

// Where a CTA of this kernel runs. Kernels that overlap have CTAs of the same numbers.
__device__ inline uint32_t& sm_of_cta(uint32_t cta) {
  constexpr int kGrids = 8, kCtasOfGrid = kCtas / kGrids;
  uint64_t grid;
  asm volatile("mov.u64 %0, %%gridid;" : "=l"(grid));
  return g_sm_of_cta[grid % kGrids * kCtasOfGrid + cta % kCtasOfGrid];
}

__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ inline WarpQueue& own_queue() {
  int warp;
  asm volatile("mov.u32 %0, %%warpid;" : "=r"(warp));
  return g_queues[sm_number()][warp];
}

// ---- Tensor memory, of this CTA or of the other of its pair

class Memory {
 public:
  explicit __device__ Memory(bool peer = false) : cta_(cta_number(peer)) {
    const int sm = peer ? __ldcg(&sm_of_cta(cta_)) : sm_number();
    memory_ = &g_memory[sm];
  }

  __device__ __noinline__ void check_columns(int first, int count) const {
    EMULATION_CHECK(first >= 0 && count > 0 && first + count <= kColumns, "column out of range");
    for (int slice = first / kSlice; slice <= (first + count - 1) / kSlice; ++slice) {
      EMULATION_CHECK((__ldcg(&memory_->owners[slice]) & ~(kGaveUp | kOfPair)) == cta_,
                      "columns that this CTA has not allocated");
    }
  }

  // Instructions for one CTA and for a pair are not mixed.
  __device__ void check_group(int first, int ctas) const {
    EMULATION_CHECK(((__ldcg(&memory_->owners[first / kSlice]) & kOfPair) != 0) == (ctas == 2),
                    "columns that were allocated for another number of CTAs");
  }

  struct Cell {
    uint32_t value;
    uint8_t state;
    __device__ uint32_t checked() const {
      EMULATION_CHECK(state != kNever, "read of a column that was never written");
      EMULATION_CHECK(state != kBeingStored, "read of a column whose store has not been waited for");
      return value;
    }
  };

  // Reads of many cells are all on their way before the first is checked.
  __device__ Cell fetch(int lane, int column) const {
    EMULATION_CHECK(lane < kLanes, "lane out of range");
    return {__ldcg(&memory_->cells[lane][column]), __ldcg(&memory_->states[lane][column])};
  }

  __device__ __noinline__ uint32_t read(int lane, int column) const { return fetch(lane, column).checked(); }

  __device__ __noinline__ void write(int lane, int column, uint32_t value, CellState state) const {
    EMULATION_CHECK(lane < kLanes, "lane out of range");
    __stcg(&memory_->cells[lane][column], value);
    set_state(lane, column, state);
  }

  __device__ void set_state(int lane, int column, CellState state) const {
    __stcg(&memory_->states[lane][column], static_cast<uint8_t>(state));
  }

  __device__ TensorMemory& raw() const { return *memory_; }

 private:
  uint32_t cta_;
  TensorMemory* memory_;
};

__device__ inline int columns_found(const TensorMemory& memory, uint32_t columns) {
  for (uint32_t first = 0; first + columns <= kColumns; first += columns) {
    bool free = true;
    for (uint32_t slice = first / kSlice; slice < (first + columns) / kSlice; ++slice) {
      free &= __ldcg(&memory.owners[slice]) == 0;
    }
    if (free) {
      return first;
    }
  }
  return -1;
}

__device__ inline void with_lock(TensorMemory& memory, auto&& function) {
  while (atomicCAS(&memory.lock, 0, 1) != 0) {
    __nanosleep(100);
  }
  __threadfence();
  function();
  __threadfence();
  atomicExch(&memory.lock, 0);
}

template <int kGroup = 1>
static __device__ __noinline__ void allocate(uint32_t destination, uint32_t columns) {
  EMULATION_CHECK(columns >= kSlice && columns <= kColumns && (columns & (columns - 1)) == 0,
                  "an allocation must be of 32, 64, 128, 256 or 512 columns");
  __syncwarp();
  const Memory memory;
  int first = -1;
  if (lane_id() == 0) {
    for (const uint32_t& owner : memory.raw().owners) {
      EMULATION_CHECK((__ldcg(&owner) & ~kOfPair) != (cta_number() | kGaveUp),
                      "an allocation after the permit was given up");
    }
    __stcg(&sm_of_cta(cta_number()), static_cast<uint32_t>(sm_number()));
    const long long begin = clock64();
    while (first < 0) {
      with_lock(memory.raw(), [&] {
        first = columns_found(memory.raw(), columns);
        for (uint32_t slice = 0; first >= 0 && slice < columns / kSlice; ++slice) {
          __stcg(&memory.raw().owners[first / kSlice + slice], cta_number() | (kGroup == 2 ? kOfPair : 0));
        }
      });
      EMULATION_CHECK(clock64() - begin < kPatience, "an allocation waits for columns that nobody frees");
    }
  }
  first = __shfl_sync(~0u, first, 0);
  for (int lane = 0; lane < kLanes; ++lane) {
    for (uint32_t column = lane_id(); column < columns; column += 32) {
      memory.write(lane, first + column, 0x7FFFFFFF, kNever);
    }
  }
  if (lane_id() == 0) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(destination), "r"(first) : "memory");
  }
  __threadfence();
  __syncwarp();
}

template <int kGroup = 1>
static __device__ __noinline__ void free(uint32_t address, uint32_t columns) {
  __syncwarp();
  const Memory memory;
  EMULATION_CHECK(address >> 16 == 0, "freed at another address than it was allocated");
  memory.check_columns(address, columns);
  memory.check_group(address, kGroup);
  for (int warp = lane_id(); warp < kWarpsOfSm; warp += 32) {
    const WarpQueue& queue = g_queues[sm_number()][warp];
    EMULATION_CHECK(__ldcg(&queue.cta) != cta_number() || __ldcg(&queue.num_operations) == 0,
                    "freed while products are in flight that no commit covers");
  }
  __syncwarp();
  if (lane_id() == 0) {
    with_lock(memory.raw(), [&] {
      for (uint32_t slice = 0; slice < columns / kSlice; ++slice) {
        __stcg(&memory.raw().owners[address / kSlice + slice], 0u);
      }
    });
  }
  __syncwarp();
}

__device__ inline void relinquish() {
  const Memory memory;
  if (lane_id() == 0) {
    with_lock(memory.raw(), [&] {
      for (uint32_t& owner : memory.raw().owners) {
        if ((__ldcg(&owner) & ~kOfPair) == cta_number()) {
          __stcg(&owner, __ldcg(&owner) | kGaveUp);
        }
      }
    });
  }
  __syncwarp();
}

// ---- Loads and stores

template <Shape kShape>
__device__ inline Place first_place(uint32_t address) {
  const Place place{0, static_cast<int>(address >> 16), static_cast<int>(address & 0xFFFF)};
  EMULATION_CHECK(place.lane / 32 == warp_in_cta() % 4, "a warp reaches its own quarter of the lanes only");
  EMULATION_CHECK(place.lane % lanes_of(kShape) == 0, "lane not aligned");
  return place;
}

template <Shape kShape, class... Registers>
__device__ inline void load(uint32_t address, Registers&... registers) {
  constexpr int kCount = sizeof...(Registers);
  __syncwarp();
  const Place first = first_place<kShape>(address);
  const Memory memory;
  memory.check_columns(first.column, columns_of(kShape, kCount));
  int r = 0;
  const auto next = [&] {
    const Place place = place_of_register(kShape, kCount, lane_id(), r++);
    return memory.read(first.lane + place.lane, first.column + place.column);
  };
  ((registers = next()), ...);
  __syncwarp();
}

template <Shape kShape, class... Registers>
__device__ inline void store(uint32_t address, const Registers&... registers) {
  constexpr int kCount = sizeof...(Registers);
  __syncwarp();
  const Place first = first_place<kShape>(address);
  const Memory memory;
  memory.check_columns(first.column, columns_of(kShape, kCount));
  int r = 0;
  const auto next = [&](uint32_t value) {
    const Place place = place_of_register(kShape, kCount, lane_id(), r++);
    memory.write(first.lane + place.lane, first.column + place.column, value, kBeingStored);
  };
  (next(registers), ...);
  if (lane_id() == 0) {
    WarpQueue& queue = own_queue();
    EMULATION_CHECK(queue.num_stores < kMaxStores, "more stores without a wait than the emulation keeps");
    queue.stores[queue.num_stores++] = {first.lane, lanes_of(kShape), first.column, columns_of(kShape, kCount)};
  }
  __syncwarp();
}

static __device__ __noinline__ void wait_store() {
  __syncwarp();
  const Memory memory;
  WarpQueue& queue = own_queue();
  for (int i = 0; i < queue.num_stores; ++i) {
    const Store store = queue.stores[i];
    for (int lane = store.lane; lane < store.lane + store.lanes; ++lane) {
      for (int column = lane_id(); column < store.columns; column += 32) {
        memory.set_state(lane, store.column + column, kWritten);
      }
    }
  }
  __threadfence();
  __syncwarp();
  if (lane_id() == 0) {
    queue.num_stores = 0;
  }
  __syncwarp();
}

// ---- Products

__device__ inline float read_shared(uint32_t address, bool peer, bool bf16) {
  uint16_t bits;
  if (peer) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(cluster_rank() ^ 1));
    asm volatile("ld.shared::cluster.u16 %0, [%1];" : "=h"(bits) : "r"(mapped) : "memory");
  } else {
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bits) : "r"(address) : "memory");
  }
  return bf16 ? __bfloat162float(__ushort_as_bfloat16(bits)) : __half2float(__ushort_as_half(bits));
}

// The CTA that issues for a pair is the one of even rank, so `cta` 1 is always the peer.
class Product {
 public:
  explicit __device__ Product(const Operation& operation)
      : operation_(operation),
        instruction_(decode_instruction(operation.instruction)),
        a_(decode_matrix(operation.a)),
        b_(decode_matrix(operation.b)),
        d_lane_(operation.d >> 16),
        d_column_(operation.d & 0xFFFF) {}

  __device__ void check() const {
    const int m = instruction_.m, n = instruction_.n, ctas = operation_.ctas;
    EMULATION_CHECK(instruction_.known && instruction_.result_format == 1 && instruction_.a_format <= 1 &&
                        instruction_.b_format == instruction_.a_format,
                    "an instruction descriptor that the emulation does not know");
    EMULATION_CHECK(m == 64 * ctas || m == 128 * ctas, "M must be 64 or 128 for each CTA");
    EMULATION_CHECK(n >= 8 && n <= 256 && n % (m == 64 ? 8 : 16) == 0, "N must be a multiple of 8 or 16 up to 256");
    check_matrix(b_);
    if (operation_.a_in_tmem) {
      EMULATION_CHECK(!instruction_.outer_a, "A in tensor memory cannot be transposed");
      EMULATION_CHECK(ctas == 1 || m == 256 || n % 64 == 0, "A in tensor memory with halves of less than 32 columns");
      EMULATION_CHECK(operation_.a >> 16 == static_cast<uint64_t>(d_lane_), "A and D must have the same lanes");
    } else {
      check_matrix(a_);
    }
    EMULATION_CHECK(d_lane_ == 0 || (m == 64 && d_lane_ == 16), "D begins at lane 0, or at 16 with M 64");
    EMULATION_CHECK(ctas == 1 || cluster_rank() % 2 == 0, "the CTA of even rank issues for a pair");
    for (int cta = 0; cta < ctas; ++cta) {
      const Memory memory(cta != 0);
      memory.check_group(d_column_, ctas);
      memory.check_columns(d_column_, m == 128 && ctas == 2 ? n / 2 : n);
      if (operation_.a_in_tmem) {
        memory.check_columns(operation_.a & 0xFFFF, 8);
      }
    }
  }

  __device__ void run() const {
    const int m_total = instruction_.m, n_total = instruction_.n, ctas = operation_.ctas;
    const Memory own, peer(ctas == 2);
    for (int first = 0; first < n_total; first += 32) {
      const int n = first + lane_id();
      float b[16];
      for (int k = 0; k < 16; ++k) {
        b[k] = n < n_total ? value_of_b(n, k) : 0.0f;
      }
      constexpr int kAtOnce = 8;
      for (int m = 0; m < m_total; m += kAtOnce) {
        float a[kAtOnce / 2];
        Memory::Cell cells[kAtOnce];
#pragma unroll
        for (int row = 0; row < kAtOnce; ++row) {
          if (operation_.accumulate && n < n_total) {
            const Place place = place_of_result(ctas, m_total, n_total, m + row, n);
            cells[row] = (place.cta == 0 ? own : peer).fetch(d_lane_ + place.lane, d_column_ + place.column);
          } else {
            cells[row] = {0, kWritten};
          }
        }
#pragma unroll
        for (int pair = 0; pair < kAtOnce / 2; ++pair) {
          a[pair] = value_of_a(own, peer, m + 2 * pair + lane_id() / 16, first, lane_id() % 16);
        }
#pragma unroll
        for (int row = 0; row < kAtOnce; ++row) {
          float sum = __uint_as_float(cells[row].checked());
          for (int k = 0; k < 16; ++k) {
            sum = fmaf(__shfl_sync(~0u, a[row / 2], row % 2 * 16 + k), b[k], sum);
          }
          if (n < n_total) {
            const Place place = place_of_result(ctas, m_total, n_total, m + row, n);
            (place.cta == 0 ? own : peer)
                .write(d_lane_ + place.lane, d_column_ + place.column, __float_as_uint(sum), kWritten);
          }
        }
      }
    }
  }

 private:
  static __device__ void check_matrix(const SharedMatrix& matrix) {
    EMULATION_CHECK(matrix.known && matrix.version == 1 && matrix.base_offset == 0 && matrix.leading_mode == 0,
                    "a matrix descriptor that the emulation does not know");
  }

  __device__ float value_of_a(const Memory& own, const Memory& peer, int m, int n, int k) const {
    float value;
    if (operation_.a_in_tmem) {
      const Place place = place_of_a(operation_.ctas, instruction_.m, instruction_.n, m, n, k);
      const uint32_t pair = (place.cta == 0 ? own : peer)
                                .read(d_lane_ + place.lane, static_cast<int>(operation_.a & 0xFFFF) + place.column);
      const auto bits = static_cast<uint16_t>(k % 2 == 0 ? pair : pair >> 16);
      value = instruction_.a_format == 1 ? __bfloat162float(__ushort_as_bfloat16(bits))
                                         : __half2float(__ushort_as_half(bits));
    } else {
      const int rows = instruction_.m / operation_.ctas;
      value = read_shared(address_of(a_, instruction_.outer_a, m % rows, k), m >= rows, instruction_.a_format == 1);
    }
    return instruction_.negate_a ? -value : value;
  }

  __device__ float value_of_b(int n, int k) const {
    const int rows = instruction_.n / operation_.ctas;
    const float value =
        read_shared(address_of(b_, instruction_.outer_b, n % rows, k), n >= rows, instruction_.b_format == 1);
    return instruction_.negate_b ? -value : value;
  }

  const Operation operation_;
  const Instruction instruction_;
  const SharedMatrix a_, b_;
  const int d_lane_, d_column_;
};

static __device__ __noinline__ void multiply(const Operation& operation) {
  __syncwarp();
  WarpQueue& queue = own_queue();
  const Product product(operation);
  product.check();
  if (lane_id() == 0) {
    EMULATION_CHECK(queue.num_operations < kMaxOperations, "more products without a commit than the emulation keeps");
    queue.cta = cta_number();
    queue.operations[queue.num_operations++] = operation;
  }
  __syncwarp();
  if constexpr (!kLazy) {
    product.run();
  }
  __syncwarp();
}

// One arrival at the barrier, in each CTA of the cluster that `ctas` names; 0: in this one.
static __device__ __noinline__ void commit(uint32_t barrier, uint32_t ctas = 0) {
  __syncwarp();
  WarpQueue& queue = own_queue();
  if constexpr (kLazy) {
    for (int i = 0; i < queue.num_operations; ++i) {
      Product(queue.operations[i]).run();
      __syncwarp();
    }
  }
  __threadfence();
  asm volatile("fence.proxy.async;" ::: "memory");
  __syncwarp();
  if (lane_id() == 0) {
    queue.num_operations = 0;
    if (ctas == 0) {
      asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
    }
    for (uint32_t cta = 0; cta < 16; ++cta) {
      if (ctas >> cta & 1) {
        uint32_t mapped;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(barrier), "r"(cta));
        asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(mapped) : "memory");
      }
    }
  }
  __syncwarp();
}

// ---- After a kernel, on the host: how many slices of columns nobody has freed.

static __global__ void count_leaks(int* leaks) {
  int found = 0;
  for (int sm = threadIdx.x; sm < kMaxSms; sm += blockDim.x) {
    for (const uint32_t owner : g_memory[sm].owners) {
      found += owner != 0;
    }
  }
  atomicAdd(leaks, found);
}

inline int leaks() {
  int *device, found = -1;
  cudaMalloc(&device, sizeof(int));
  cudaMemset(device, 0, sizeof(int));
  count_leaks<<<1, 160>>>(device);
  cudaMemcpy(&found, device, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return found;
}

}  // namespace flash_mla::emulation
