// Float32 sums depend on their order: where it matters, the items of a backward take turns in adding to the gradient
// of Q.
#pragma once

#include <cstdint>

#include "core/params/dense_prefill_backward.h"

namespace flash_mla::inline device {

// How many tiles of keys add to a tile of queries before this one: those behind it in a causal call, since they have
// been handed out before, else those in front of it.
__device__ __forceinline__ int turn_of(const BackwardItem& item, int tile, bool causal) {
  if (!causal) {
    return item.key_tile;
  }
  const int last_query = min((tile + 1) * kBackwardQueryTile, item.num_queries) - 1;
  return (last_query + item.limit - 1) / kBackwardKeyTile;
}

// One thread, the same that adds; what it adds is complete before it passes the turn on.
__device__ __forceinline__ void wait_for_turn(const int32_t* turn, int wanted) {
  int value;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
  } while (value != wanted);
  asm volatile("fence.proxy.async.global;" ::: "memory");
}

__device__ __forceinline__ void pass_turn_on(int32_t* turn) {
  asm volatile("fence.proxy.async.global;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
}

}  // namespace flash_mla::inline device
