// In which order the warp that issues all products of sparse attention does so. The scores of a tile come before the
// values of the tile before it, so that the tensor cores work while the math warps exponentiate.
#pragma once

#include "device/barrier.cuh"
#include "device/sm100/tcgen05.cuh"

namespace flash_mla::sm100 {

// `scores(slot)`, and `values(slot, first)`: the first of a piece overwrite the output. `release_q(any)`: behind the
// last scores of a piece; `any`: it has some.
template <class Storage, class Scores, class Values, class ReleaseQ>
__device__ __forceinline__ void in_order_of_products(Storage& storage, Scores&& scores, Values&& values,
                                                     ReleaseQ&& release_q) {
  for (uint32_t piece = 0;; piece ^= 1) {
    mbarrier_wait(shared_address(&storage.q_full), piece);
    const int num_tiles = storage.pieces[piece].num_tiles;
    if (num_tiles < 0) {
      return;
    }
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      scores(tile & 1);
      if (tile + 1 == num_tiles) {
        release_q(true);
      }
      if (tile > 0) {
        values((tile - 1) & 1, tile == 1);
      }
    }
    if (num_tiles > 0) {
      values((num_tiles - 1) & 1, num_tiles == 1);
    } else {
      release_q(false);
    }
  }
}

template <class Storage, class Scores, class Values>
__device__ __forceinline__ void issue_products(Storage& storage, Scores&& scores, Values&& values) {
  in_order_of_products(storage, scores, values, [&](bool any) {
    if (any) {
      umma_commit(shared_address(&storage.q_empty));
    } else {
      mbarrier_arrive_if(shared_address(&storage.q_empty), elect_one());
    }
  });
}

}  // namespace flash_mla::sm100
