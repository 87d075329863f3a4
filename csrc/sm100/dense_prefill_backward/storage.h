// Shared-memory map of the backward of dense prefill, and what its warps walk.
#pragma once

#include <cuda.h>

#include "sm100/dense_prefill_backward/config.h"

namespace flash_mla::sm100::dense_prefill_backward {

template <class C>
struct Storage {
  typename C::Cutlass::TensorStorage tensors;
  typename C::Cutlass::PipelineStorage pipelines;
  BackwardItem item;  // num_keys 0: there is none
  uint32_t tensor_memory;
};

struct TensorMaps {
  CUtensorMap q, k, v, d_out, dq_sum;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= cutlass::arch::sm100_smem_capacity_bytes;

// Calls f(query head, tile of queries) for what an item meets, in order.
template <class F>
__device__ __forceinline__ void for_tiles(const BackwardItem& item, int group, F&& f) {
  const int end = ceil_div(item.num_queries, kBackwardQueryTile);
  for (int head = item.kv_head * group, left = group; left > 0; --left, ++head) {
    for (int tile = item.first_tile; tile < end; ++tile) {
      f(head, tile);
    }
  }
}

// Rows of a tile that the sequence has.
__device__ __forceinline__ int rows_of(const BackwardItem& item, int tile) {
  return min(kBackwardQueryTile, item.num_queries - tile * kBackwardQueryTile);
}

}  // namespace flash_mla::sm100::dense_prefill_backward
