// Shared-memory map of the sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a row,
// whose 16-byte units are permuted by the row.
#pragma once

#include "device/barrier.cuh"
#include "sm100/sparse_attention/config.h"

namespace flash_mla::sm100::sparse_attention {

template <class C>
struct Storage {
  // The probabilities of a slot lie in its RoPE slice where that is no part of the values: it is dead once it is
  // scored.
  static constexpr int kProbabilityBytes = C::kRopeBehindValues ? 0 : 2 * C::kSliceBytes;

  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityBytes];
  alignas(8) unsigned char valid[2][C::kProducerWarps];  // of a slot: a bit for each key that counts
  PieceFacts pieces[2];                                  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[2][kNumParts];
  uint64_t k_empty[2];  // also: the output has the slot's values
  uint64_t q_full, q_empty;
  uint64_t scores_full[2];
  uint64_t probabilities_full[2];
  uint32_t tensor_memory;
};

template <class C>
__device__ __forceinline__ uint32_t probabilities_of(const Storage<C>& storage, int slot) {
  if constexpr (C::kRopeBehindValues) {
    return shared_address(storage.k[0]) + slot * C::kTileBytes + C::kRopeSlice * C::kSliceBytes;
  } else {
    return shared_address(storage.probabilities) + slot * C::kSliceBytes;
  }
}

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm100::sparse_attention
