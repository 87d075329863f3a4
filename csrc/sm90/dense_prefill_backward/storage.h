// Shared-memory map of the backward of dense prefill. Slices are rows x 128 bytes in TMA's 128-byte swizzle.
#pragma once

#include <cuda.h>

#include "sm90/dense_prefill_backward/config.h"

namespace flash_mla::sm90::dense_prefill_backward {

struct Item : BackwardItem {
  __device__ __forceinline__ bool exists() const { return num_keys > 0; }
  __device__ __forceinline__ int end_tile() const { return ceil_div(num_queries, kBackwardQueryTile); }
};

template <class C>
struct Storage {
  using WorkItem = Item;

  alignas(1024) unsigned char k[C::kKBytes];
  alignas(1024) unsigned char v[C::kVBytes];
  alignas(1024) unsigned char q[C::kStages][C::kQBytes];
  alignas(1024) unsigned char d_out[C::kStages][C::kOutBytes];
  alignas(1024) unsigned char ds[C::kDsBytes];
  alignas(1024) unsigned char dq[C::kWarpgroups][C::kDqBytes];
  alignas(16) float log_sums[C::kStages][C::kQueries];  // log2(e) * lse
  alignas(16) float deltas[C::kStages][C::kQueries];
  alignas(16) Item items[2];
  uint64_t item_full[2], item_empty[2];
  uint64_t item_wanted;                                    // the loads of the item before are nearly all issued
  uint64_t keys_full, keys_empty;                          // K and V
  uint64_t rows_full[C::kStages], rows_empty[C::kStages];  // Q, the output's gradient, row terms
  // The same for what goes beyond a sequence's end and is to be cleaned.
  uint64_t keys_landed, rows_landed[C::kStages];
  uint64_t ds_empty;
  uint64_t dq_full[C::kWarpgroups], dq_empty[C::kWarpgroups];
};

struct TensorMaps {
  CUtensorMap q, k, v, d_out, dq_sum;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::dense_prefill_backward
