// Shared-memory map of the backward of sparse prefill. Slices are 64 rows x 128 bytes in TMA's 128-byte swizzle.
#pragma once

#include <cuda.h>

#include "sm90/sparse_prefill_backward/config.h"

namespace flash_mla::sm90::sparse_prefill_backward {

template <class C>
struct Storage {
  alignas(1024) unsigned char q[C::kSlices * C::kSliceBytes];
  alignas(1024) unsigned char d_out[C::kValueSlices * C::kSliceBytes];
  alignas(1024) unsigned char k[C::kSlices * C::kSliceBytes];
  alignas(1024) unsigned char probabilities[C::kSliceBytes];  // with the sink's share taken off
  alignas(1024) unsigned char d_scores[C::kSliceBytes];       // before that, the probabilities without a sink
  // By parity of the tile.
  int slots[2][C::kKeys];  // -1: a key that does not count
  alignas(8) uint16_t valid[2][C::kProducerWarps];
  uint64_t q_full, q_empty;  // Q and the output's gradient
  uint64_t k_full[C::kWarpgroups], k_empty[C::kWarpgroups];
  uint64_t probabilities_empty;  // and d_scores
};

struct TensorMaps {
  CUtensorMap q, d_out;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_prefill_backward
