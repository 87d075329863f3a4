// Work items: 64 heads of a query token, with all of its keys. Every role walks them by itself.
#pragma once

#include "core/schedule.h"
#include "sm90/sparse_prefill_backward/config.h"

namespace flash_mla::sm90::sparse_prefill_backward {

struct Item {
  int token, first_head;
  int length;  // of the token's list of keys
};

// Calls f(item) for the items of this CTA.
template <class C, class F>
__device__ __forceinline__ void for_items(const SparsePrefillBackwardParams& params, F&& f) {
#pragma unroll 1
  for (int number = blockIdx.x;; number += gridDim.x) {
    Item item;
    item.token = number / params.head_blocks;
    if (item.token >= params.s_q) {
      return;
    }
    item.first_head = number % params.head_blocks * C::kHeads;
    item.length = params.keys.topk;
    if (params.keys.lengths != nullptr) {
      item.length = min(max(params.keys.lengths[item.token * params.keys.stride_lengths_s], 0), item.length);
    }
    f(item);
  }
}

}  // namespace flash_mla::sm90::sparse_prefill_backward
