// Each emulated instruction against plain arithmetic, and each trap. `instructions CASE` runs one case: 0 where it did
// what it should; a trap ends it with its message.
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <utility>
#include <vector>

#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/numeric.cuh"
#include "device/sm100/gather.cuh"
#include "device/sm100/tcgen05.cuh"

namespace flash_mla {
namespace {

constexpr int kM = 64, kN = 64, kInner = 128, kSliceBytes = 64 * kSliceRowBytes;
// What rows are gathered from: not all of the columns that A has.
constexpr int kSourceRows = 100, kSourceColumns = 120, kSourceStride = 136;

enum class Case {
  kProduct,          // 64 x 64 x 128, A and B with the inner dimension contiguous
  kOuterB,           // B with the other dimension contiguous
  kUpperLanes,       // the result in the upper halves of the lanes
  kTmemA,            // A from tensor memory
  kStoreLoad,        // registers to tensor memory and back
  kGather,           // A from rows by their numbers, some of which do not exist
  kSwizzleBit,       // from here on mistakes, that must be found: a unit of A at another place
  kSwappedOffsets,   // leading and stride offset of B exchanged
  kNoWaitForResult,  // the result is read before the commit
  kNoWaitForStore,
  kNeverWritten,
  kAccumulatesOnNothing,
  kNotAllocated,
  kOtherQuarter,
  kNoCommit,
  kLeak,
  kAllocationTwice,
  kAfterRelinquish,
  kGatherMisaligned,
  kGatherSwapped,    // two rows exchanged
  kGatherBeyond,     // from a matrix that has fewer rows than its map says
  kGatherNotWaited,  // the product does not wait for its rows
  kGatherTooSoon,    // rows over those of products that are in flight
  kPair,             // two CTAs: 128 x 64 x 128, A and B with the inner dimension contiguous
  kPairOuterB,       // 128 x 256 x 64, B with the other dimension contiguous
  kPairTmemA,        // A from tensor memory
  kPairHalfOfA,      // mistakes: A in half of the lanes only
  kPairOfOne,        // columns that one CTA has allocated for itself
  kPairOddIssuer,
  kPairNoWaitForResult,
  kPairNoCommit,
  kPairLeak,
  kNumCases
};
constexpr const char* kNames[] = {"product",
                                  "outer_b",
                                  "upper_lanes",
                                  "tmem_a",
                                  "store_load",
                                  "gather",
                                  "swizzle_bit",
                                  "swapped_offsets",
                                  "no_wait_for_result",
                                  "no_wait_for_store",
                                  "never_written",
                                  "accumulates_on_nothing",
                                  "not_allocated",
                                  "other_quarter",
                                  "no_commit",
                                  "leak",
                                  "allocation_twice",
                                  "after_relinquish",
                                  "gather_misaligned",
                                  "gather_swapped",
                                  "gather_beyond",
                                  "gather_not_waited",
                                  "gather_too_soon",
                                  "pair",
                                  "pair_outer_b",
                                  "pair_tmem_a",
                                  "pair_half_of_a",
                                  "pair_of_one",
                                  "pair_odd_issuer",
                                  "pair_no_wait_for_result",
                                  "pair_no_commit",
                                  "pair_leak"};
static_assert(std::size(kNames) == static_cast<int>(Case::kNumCases));

struct Shared {
  alignas(1024) unsigned char a[2 * kSliceBytes], b[2 * kSliceBytes];
  uint64_t done, gathered;
  uint32_t tensor_memory;
};

__device__ __nv_bfloat16* value_at(unsigned char* slices, int row, int column) {
  const int unit = column % 64 / 8;
  return reinterpret_cast<__nv_bfloat16*>(slices + column / 64 * kSliceBytes + row * kSliceRowBytes +
                                          (unit ^ row % 8) * 16) +
         column % 8;
}

constexpr bool is_gather(Case which) {
  return which == Case::kGather || (which >= Case::kGatherMisaligned && which < Case::kPair);
}

// Four rows of each slice of A. By a whole warp.
__device__ void gather_rows(Case which, Shared& shared, const GatherMap& map, const int* rows, int first) {
  for (int slice = 0; slice < kInner / kSliceColumns; ++slice) {
    int4 four = *reinterpret_cast<const int4*>(rows + first);
    if (which == Case::kGatherSwapped && first == 8) {
      std::swap(four.x, four.z);
    }
    const uint32_t place = shared_address(shared.a) + slice * kSliceBytes + first * kSliceRowBytes;
    tma_gather4(place + (which == Case::kGatherMisaligned ? 16 : 0), &map, slice * kSliceColumns, four,
                shared_address(&shared.gathered));
  }
}

// a: [kM][kInner], b: [kN][kInner], d: [kM][kN]. rows: of the map's matrix, what A is to be gathered from.
__global__ void instructions_kernel(Case which, const float* a, const float* b, float* d,
                                    const __grid_constant__ GatherMap map, const int* rows) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  const bool outer_b = which == Case::kOuterB || which == Case::kSwappedOffsets;
  for (int i = threadIdx.x; i < kM * kInner; i += blockDim.x) {
    const int row = i / kInner, column = i % kInner;
    *value_at(shared.a, row, column) = is_gather(which) ? __nv_bfloat16() : __float2bfloat16(a[i]);
    // With the outer dimension contiguous, rows are those of the sum.
    if (outer_b) {
      *value_at(shared.b, column, row) = __float2bfloat16(b[i]);
    } else {
      *value_at(shared.b, row, column) = __float2bfloat16(b[i]);
    }
  }
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&shared.done), 1);
    mbarrier_init(shared_address(&shared.gathered), 1);
    fence_mbarrier_init();
    if (which == Case::kSwizzleBit) {
      std::swap(*value_at(shared.a, 5, 0), *value_at(shared.a, 5, 8));
    }
  }
  fence_async_proxy();
  if (warp == 0) {
    tmem_allocate(shared_address(&shared.tensor_memory), 128);
    if (which == Case::kAllocationTwice) {
      tmem_allocate(shared_address(&shared.tensor_memory), 512);
    }
    tmem_relinquish();
    if (which == Case::kAfterRelinquish) {
      tmem_allocate(shared_address(&shared.tensor_memory), 64);
    }
    tcgen05_fence_before();
  }
  __syncthreads();
  tcgen05_fence_after();
  const uint32_t base = shared.tensor_memory, own = base + tmem_lane(32 * warp);
  const uint32_t result = which == Case::kUpperLanes ? tmem_lane(16) : 0;
  float registers[32];

  if (which == Case::kStoreLoad || which == Case::kNoWaitForStore || which == Case::kNotAllocated ||
      which == Case::kOtherQuarter) {
    for (int i = 0; i < 32; ++i) {
      const int row = warp * 16 + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      registers[i] = a[row * kInner + column];
    }
    tmem_store_16x256(own + (which == Case::kNotAllocated ? 128 : 0) +
                          (which == Case::kOtherQuarter && warp == 0 ? tmem_lane(32) : 0),
                      registers);
    if (which != Case::kNoWaitForStore) {
      tmem_wait_store();
    }
  } else if (which != Case::kNeverWritten) {
    if (which == Case::kTmemA) {
      // Two values to a column: 64 columns, behind those of the result.
      for (int i = 0; i < 32; ++i) {
        const int row = warp * 16 + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
        const float* pair = a + row * kInner + 2 * column;
        registers[i] = __uint_as_float(pack2<__nv_bfloat16>(pair[0], pair[1]));
      }
      tmem_store_16x256(own + 64, registers);
      tmem_wait_store();
      tcgen05_fence_before();
      __syncthreads();
      tcgen05_fence_after();
    }
    if (is_gather(which) && warp == 0) {
      if (lane == 0) {
        mbarrier_arrive_expect_bytes(shared_address(&shared.gathered), 2 * kSliceBytes);
      }
      __syncwarp();
      for (int first = 0; first < kM; first += kGatherRows) {
        gather_rows(which, shared, map, rows, first);
      }
      if (which != Case::kGatherNotWaited) {
        mbarrier_wait(shared_address(&shared.gathered), 0);
      }
    }
    if (warp == 0) {
      const Major major = outer_b ? Major::kOuter : Major::kInner;
      const uint32_t instruction = umma_instruction<__nv_bfloat16>(kM, kN, Major::kInner, major);
      const UmmaDescriptor da(shared_address(shared.a), 16), db(shared_address(shared.b), kSliceBytes);
      for (int j = 0; j < kInner / 16; ++j) {
        const uint32_t step = j / 4 * kSliceBytes + j % 4 * 32;
        uint64_t of_b = outer_b ? db.at(j * 16 * kSliceRowBytes) : db.at(step);
        if (which == Case::kSwappedOffsets) {
          of_b = (of_b & ~0x3FFF3FFF0000ull) | (of_b >> 16 & 0x3FFFull << 16) | (of_b & 0x3FFFull << 16) << 16;
        }
        const bool accumulate = j > 0 || which == Case::kAccumulatesOnNothing;
        if (which == Case::kTmemA) {
          umma_ts(base + result, base + 64 + j * 8, of_b, instruction, accumulate);
        } else {
          umma_ss(base + result, da.at(step), of_b, instruction, accumulate);
        }
      }
      if (which == Case::kGatherTooSoon) {
        gather_rows(which, shared, map, rows, 4);
      }
      if (which != Case::kNoWaitForResult && which != Case::kNoCommit) {
        umma_commit(shared_address(&shared.done));
      }
    }
    if (which != Case::kNoWaitForResult && which != Case::kNoCommit) {
      mbarrier_wait(shared_address(&shared.done), 0);
    }
    __syncthreads();
    tcgen05_fence_after();
  }
  if (which != Case::kNoCommit) {
    tmem_load_16x256(own + result, registers);
    tmem_wait_load(registers);
  }
  for (int i = 0; i < 32; ++i) {
    const int row = warp * 16 + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
    d[row * kN + column] = registers[i];
  }
  tcgen05_fence_before();
  __syncthreads();
  if (warp == 0 && which != Case::kLeak) {
    tcgen05_fence_after();
    if (which == Case::kNoWaitForResult) {
      umma_commit(shared_address(&shared.done));
    }
    tmem_free(base, 128);
  }
}

// Rows of which A is made, in device memory: `a` becomes what they are to be. All that is not asked for is no number.
GatherMap make_rows(Case which, std::vector<float>& a, int*& device_rows) {
  std::vector<int> rows(kM);
  std::vector<__nv_bfloat16> source(2 * kSourceRows * kSourceStride, __float2bfloat16(NAN));
  for (int m = 0; m < kM; ++m) {
    constexpr int kSpecial[] = {-1, kSourceRows, INT_MIN, INT_MAX, 0, kSourceRows - 1, 0};
    rows[m] = m % 3 == 0 ? kSpecial[m / 3 % std::size(kSpecial)] : std::rand() % kSourceRows;
    const bool exists = rows[m] >= 0 && rows[m] < kSourceRows;
    for (int k = 0; k < kInner; ++k) {
      a[m * kInner + k] = exists && k < kSourceColumns ? static_cast<float>((rows[m] * 7 + k * 3) % 9 - 4) : 0.0f;
      if (exists && k < kSourceColumns) {
        source[rows[m] * kSourceStride + k] = __float2bfloat16(a[m * kInner + k]);
      }
    }
  }
  void* device_source;
  cudaMalloc(&device_source, source.size() * sizeof(source[0]));
  cudaMemcpy(device_source, source.data(), source.size() * sizeof(source[0]), cudaMemcpyHostToDevice);
  cudaMalloc(&device_rows, rows.size() * sizeof(int));
  cudaMemcpy(device_rows, rows.data(), rows.size() * sizeof(int), cudaMemcpyHostToDevice);
  return gather_map<__nv_bfloat16>({"source", device_source, kSourceRows + (which == Case::kGatherBeyond),
                                    kSourceStride * sizeof(source[0]), kSourceColumns});
}

// ---- Two CTAs

constexpr int kPairM = 128;
constexpr int pair_n(Case which) { return which == Case::kPairOuterB ? 256 : 64; }
constexpr int pair_inner(Case which) { return which == Case::kPairOuterB ? 64 : 128; }

// a: [kPairM][inner], b: [n][inner], d: [kPairM][n]. A CTA has 64 rows of A and half of those of B, and of the results
// its rows: a half of n in the lower half of the lanes, the other in the upper.
__global__ void __cluster_dims__(2, 1, 1)
    pair_kernel(Case which, const float* all_a, const float* all_b, float* all_d) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, rank = cluster_rank();
  const bool outer_b = which == Case::kPairOuterB, tmem_a = which == Case::kPairTmemA || which == Case::kPairHalfOfA;
  const int n = pair_n(which), inner = pair_inner(which);
  const float *a = all_a + rank * 64 * inner, *b = all_b + rank * n / 2 * inner;
  float* d = all_d + rank * 64 * n;
  for (int i = threadIdx.x; i < 64 * inner; i += blockDim.x) {
    *value_at(shared.a, i / inner, i % inner) = __float2bfloat16(a[i]);
  }
  for (int i = threadIdx.x; i < n / 2 * inner; i += blockDim.x) {
    const int row = i / inner, column = i % inner;
    *(outer_b ? value_at(shared.b, column, row) : value_at(shared.b, row, column)) = __float2bfloat16(b[i]);
  }
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&shared.done), 1);
    fence_mbarrier_init();
  }
  fence_async_proxy();
  if (warp == 0) {
    if (which == Case::kPairOfOne) {
      tmem_allocate(shared_address(&shared.tensor_memory), 128);
    } else {
      tmem_allocate<2>(shared_address(&shared.tensor_memory), 128);
      tmem_relinquish<2>();
    }
    tcgen05_fence_before();
  }
  __syncthreads();
  tcgen05_fence_after();
  const uint32_t base = shared.tensor_memory, own = base + tmem_lane(32 * warp);
  float registers[32];
  const int row = warp % 2 * 32 + lane;
  if (tmem_a && !(which == Case::kPairHalfOfA && warp >= 2)) {
    // Behind the 32 columns of the result.
    for (int part = 0; part < 2; ++part) {
      for (int i = 0; i < 32; ++i) {
        const float* pair = a + row * inner + part * 64 + 2 * i;
        registers[i] = __uint_as_float(pack2<__nv_bfloat16>(pair[0], pair[1]));
      }
      tmem_store_32x32(own + 32 + part * 32, registers);
    }
    tmem_wait_store();
  }
  tcgen05_fence_before();
  cluster_sync();
  tcgen05_fence_after();
  const bool commits = which != Case::kPairNoWaitForResult && which != Case::kPairNoCommit;
  if (rank == (which == Case::kPairOddIssuer) && warp == 0) {
    const uint32_t instruction =
        umma_instruction<__nv_bfloat16>(kPairM, n, Major::kInner, outer_b ? Major::kOuter : Major::kInner);
    const UmmaDescriptor da(shared_address(shared.a), 16), db(shared_address(shared.b), kSliceBytes);
    for (int j = 0; j < inner / 16; ++j) {
      const uint32_t step = j / 4 * kSliceBytes + j % 4 * 32;
      const uint64_t of_b = db.at(outer_b ? j * 16 * kSliceRowBytes : step);
      if (tmem_a) {
        umma_ts<2>(base, base + 32 + j * 8, of_b, instruction, j > 0);
      } else {
        umma_ss<2>(base, da.at(step), of_b, instruction, j > 0);
      }
    }
    if (commits) {
      umma_commit_pair(shared_address(&shared.done));
    }
  }
  if (commits) {
    mbarrier_wait(shared_address(&shared.done), 0);
  } else {
    cluster_sync();
  }
  tcgen05_fence_after();
  for (int first = 0; first < n / 2 && which != Case::kPairNoCommit; first += 32) {
    tmem_load_32x32(own + first, registers);
    tmem_wait_load(registers);
    for (int i = 0; i < 32; ++i) {
      d[row * n + warp / 2 * (n / 2) + first + i] = registers[i];
    }
  }
  tcgen05_fence_before();
  cluster_sync();
  if (warp == 0 && which != Case::kPairLeak) {
    tcgen05_fence_after();
    if (which == Case::kPairNoWaitForResult && rank == 0) {
      umma_commit_pair(shared_address(&shared.done));
    }
    tmem_free<2>(base, 128);
  }
  // A CTA's memory stays until nothing is done in it any more.
  cluster_sync();
}

// 0: right, 1: wrong.
int run(Case which) {
  const bool pair = which >= Case::kPair;
  const int rows = pair ? kPairM : kM, columns = pair ? pair_n(which) : kN, inner = pair ? pair_inner(which) : kInner;
  std::vector<float> a(rows * inner), b(columns * inner), d(rows * columns, NAN);
  for (auto* values : {&a, &b}) {
    for (float& value : *values) {
      value = static_cast<float>(std::rand() % 9 - 4);
    }
  }
  GatherMap map{};
  int* gathered = nullptr;
  if (is_gather(which)) {
    map = make_rows(which, a, gathered);
  }
  float* device[3];
  const std::vector<float>* hosts[3] = {&a, &b, &d};
  for (int i = 0; i < 3; ++i) {
    cudaMalloc(&device[i], hosts[i]->size() * sizeof(float));
    cudaMemcpy(device[i], hosts[i]->data(), hosts[i]->size() * sizeof(float), cudaMemcpyHostToDevice);
  }
  cudaFuncSetAttribute(instructions_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  cudaFuncSetAttribute(pair_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared));
  if (pair) {
    pair_kernel<<<2, 128, sizeof(Shared)>>>(which, device[0], device[1], device[2]);
  } else {
    instructions_kernel<<<1, 128, sizeof(Shared)>>>(which, device[0], device[1], device[2], map, gathered);
  }
  const cudaError_t status = cudaDeviceSynchronize();
  if (status != cudaSuccess) {
    std::printf("%s\n", cudaGetErrorString(status));
    return 2;
  }
  cudaMemcpy(d.data(), device[2], d.size() * sizeof(float), cudaMemcpyDeviceToHost);
  int wrong = 0;
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < columns; ++n) {
      float wanted = 0;
      for (int k = 0; k < inner; ++k) {
        wanted += a[m * inner + k] * b[n * inner + k];
      }
      if (which == Case::kStoreLoad) {
        wanted = a[m * inner + n];
      }
      wrong += d[m * columns + n] != wanted;
    }
  }
#ifdef FLASH_MLA_EMULATED
  const int leaks = emulation::leaks(), unfinished = emulation::unfinished_gathers();
#else
  const int leaks = 0, unfinished = 0;
#endif
  std::printf("%d of %d values are wrong, %d slices of columns were not freed, %d gathers were not waited for\n", wrong,
              rows * columns, leaks, unfinished);
  return wrong != 0 || leaks != 0 || unfinished != 0;
}

}  // namespace
}  // namespace flash_mla

int main(int argc, char** argv) {
  for (int i = 0; argc > 1 && i < static_cast<int>(flash_mla::Case::kNumCases); ++i) {
    if (std::strcmp(argv[1], flash_mla::kNames[i]) == 0) {
      return flash_mla::run(static_cast<flash_mla::Case>(i));
    }
  }
  std::printf("no such case\n");
  return 3;
}
