// Shared-memory map of the dense prefill kernel. Slices are rows x 64 columns of 16-bit values in TMA's 128-byte
// swizzle.
#pragma once

#include <cuda.h>

#include "sm90/dense_prefill/config.h"

namespace flash_mla::sm90::dense_prefill {

// A work item: the rows of one tile of one sequence and head.
struct Item {
  int first_token;  // of q
  int num_rows;     // 1 to kRows; 0: there are no more items
  int head;
  int first_key;  // token of the sequence's first key
  int num_keys;   // of the sequence
  int num_tiles;  // of keys that any of the rows sees
  int limit;      // keys that row 0 sees, may be negative; each further row sees one more where the call is causal
  int reserved;

  __device__ __forceinline__ bool exists() const { return num_rows > 0; }
};

template <class C>
struct Storage {
  using WorkItem = Item;

  alignas(1024) unsigned char q[C::kWarpgroups][C::kQBytes];
  alignas(1024) unsigned char k[C::kStages][C::kKBytes];
  alignas(1024) unsigned char v[C::kStages][C::kVBytes];
  alignas(16) Item items[2];
  uint64_t item_full[2], item_empty[2];
  uint64_t item_wanted;  // the loads of the item before are nearly all issued
  uint64_t q_full[C::kWarpgroups], q_empty[C::kWarpgroups];
  uint64_t k_full[C::kStages], k_empty[C::kStages];
  uint64_t v_full[C::kStages], v_empty[C::kStages];
  uint64_t v_landed[C::kStages];  // values that go beyond the sequence's end, to be cleaned
};

struct TensorMaps {
  CUtensorMap q, k, v;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::dense_prefill
