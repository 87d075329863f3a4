// TMA's tile::gather4 in software. A tensor map is plain numbers here.
//
// Eager: rows are there as soon as they are asked for. Lazy: what was there turns into garbage, and the rows come when
// somebody waits for the barrier that counts them.
#pragma once

#include "emulation/emulation.cuh"

namespace flash_mla::emulation {

struct alignas(64) GatherMap {
  const uint16_t* data;
  int64_t rows, stride;  // stride: bytes
  int columns;
};

struct Gather {
  const GatherMap* map;
  uint32_t destination, barrier;
  int column, rows[4];
};

enum GatherState : uint32_t { kNoGather = 0, kBeingIssued = 1, kIssued = 2, kBeingDone = 3 };

struct GatherSlot {
  uint32_t state, cta;
  Gather gather;
};

constexpr int kMaxGathers = 256;  // of an SM, that nobody has waited for
static __device__ GatherSlot g_gathers[kLazy ? kMaxSms : 1][kMaxGathers];
static __device__ int g_gather_slots[kMaxSms];  // how many have been used

// Values 8 `unit` to 8 `unit` + 7 of a row of the box.
__device__ inline void gather_unit(const Gather& gather, int row, int unit, bool garbage) {
  const GatherMap& map = *gather.map;
  uint16_t values[8];
  for (int i = 0; i < 8; ++i) {
    const int64_t column = int64_t{gather.column} + unit * 8 + i, number = gather.rows[row];
    const bool exists = number >= 0 && number < map.rows && column >= 0 && column < map.columns;
    values[i] = garbage ? 0x7FC1 : !exists ? 0 : map.data[number * map.stride / 2 + column];
  }
  const uint32_t place = gather.destination + row * 128 + unit * 16;
  for (int i = 0; i < 8; ++i) {
    asm volatile("st.shared.u16 [%0], %1;" ::"r"((place ^ (place >> 7 & 7) << 4) + 2 * i), "h"(values[i]) : "memory");
  }
}

__device__ inline void count_gather(const Gather& gather) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(gather.barrier), "r"(4 * 128)
               : "memory");
}

static __device__ __noinline__ void gather(const Gather& gather) {
  __syncwarp();
  EMULATION_CHECK(gather.destination % 128 == 0, "a gather's destination must be aligned to 128 bytes");
  EMULATION_CHECK(reinterpret_cast<uintptr_t>(gather.map) % 64 == 0, "a tensor map must be aligned to 64 bytes");
  EMULATION_CHECK(reinterpret_cast<uintptr_t>(gather.map->data) % 16 == 0 && gather.map->stride % 16 == 0,
                  "gathered rows must be aligned to 16 bytes");
  gather_unit(gather, lane_id() / 8, lane_id() % 8, kLazy);
  __threadfence_block();
  __syncwarp();
  if (lane_id() == 0) {
    if constexpr (kLazy) {
      const int sm = sm_number();
      int slot = 0;
      while (slot < kMaxGathers && atomicCAS(&g_gathers[sm][slot].state, kNoGather, kBeingIssued) != kNoGather) {
        ++slot;
      }
      EMULATION_CHECK(slot < kMaxGathers, "more gathers that nobody waits for than the emulation keeps");
      g_gathers[sm][slot].cta = cta_number();
      g_gathers[sm][slot].gather = gather;
      atomicMax(&g_gather_slots[sm], slot + 1);
      __threadfence();
      atomicExch(&g_gathers[sm][slot].state, kIssued);
    } else {
      count_gather(gather);
    }
  }
  __syncwarp();
}

// Those that a barrier counts, by any thread.
static __device__ __noinline__ void finish_gathers(uint32_t barrier) {
  const int sm = sm_number(), slots = __ldcg(&g_gather_slots[sm]);
  for (int i = 0; i < slots; ++i) {
    GatherSlot& slot = g_gathers[sm][i];
    // Between these looks the slot may have been filled anew.
    if (__ldcg(&slot.state) != kIssued || __ldcg(&slot.cta) != cta_number() ||
        __ldcg(&slot.gather.barrier) != barrier || atomicCAS(&slot.state, kIssued, kBeingDone) != kIssued) {
      continue;
    }
    __threadfence();
    if (__ldcg(&slot.cta) != cta_number()) {
      atomicExch(&slot.state, kIssued);
      continue;
    }
    Gather gather;
    gather.map = reinterpret_cast<const GatherMap*>(__ldcg(reinterpret_cast<const uint64_t*>(&slot.gather.map)));
    gather.destination = __ldcg(&slot.gather.destination), gather.barrier = __ldcg(&slot.gather.barrier);
    gather.column = __ldcg(&slot.gather.column);
    for (int row = 0; row < 4; ++row) {
      gather.rows[row] = __ldcg(&slot.gather.rows[row]);
    }
    for (int unit = 0; unit < 32; ++unit) {
      gather_unit(gather, unit / 8, unit % 8, false);
    }
    __threadfence_block();
    count_gather(gather);
    atomicExch(&slot.state, kNoGather);
  }
}

__device__ inline bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
               : "=r"(ended)
               : "r"(barrier), "r"(parity)
               : "memory");
  return ended;
}

// ---- After a kernel, on the host: how many gathers nobody has waited for.

static __global__ void count_gathers(int* found) {
  for (const auto& slots : g_gathers) {
    for (const GatherSlot& slot : slots) {
      *found += slot.state != kNoGather;
    }
  }
}

inline int unfinished_gathers() {
  int *device, found = -1;
  cudaMalloc(&device, sizeof(int));
  cudaMemset(device, 0, sizeof(int));
  count_gathers<<<1, 1>>>(device);
  cudaMemcpy(&found, device, sizeof(int), cudaMemcpyDeviceToHost);
  cudaFree(device);
  return found;
}

}  // namespace flash_mla::emulation
