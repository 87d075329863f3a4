// Shared-memory map of a CTA of the paired sparse attention kernels. Slices have 64 columns of bfloat16, 128 bytes a
// row, whose 16-byte units are permuted by the row. Both CTAs of a pair have the same map.
#pragma once

#include "device/barrier.cuh"
#include "sm100/sparse_attention_paired/config.h"

namespace flash_mla::sm100::sparse_attention_paired {

// Of a tile's keys; a turn is over before math warps are done with the tile four before.
constexpr int kValidTurns = 4;

template <class C>
struct Storage {
  alignas(1024) unsigned char q[C::kSharedQSlices * C::kQSliceBytes];
  alignas(1024) unsigned char keys[2][C::kKeyBytes];
  alignas(1024) unsigned char values[2][C::kValueBytes];
  alignas(1024) unsigned char probabilities[2][C::kSliceBytes];
  float row_values[2][2][kRowTile];  // what the two warps of a row tell each other, by half of the keys
  alignas(8) unsigned char valid[kValidTurns][C::kProducerWarps];  // a bit for each of a warp's keys that counts
  PieceFacts pieces[2];                                            // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t q_full, q_empty;
  uint64_t keys_full[2], values_full[2];
  uint64_t valid_full[kValidTurns];
  uint64_t scores_full[2];   // also: the slot's keys may go
  uint64_t values_empty[2];  // also: the output has the slot's values
  // Of both CTAs, in the one that issues products.
  uint64_t probabilities_full[2], peer_keys_full[2], peer_values_full[2];
  uint32_t tensor_memory;
};

template <class C>
__device__ __forceinline__ void publish_valid(Storage<C>& storage, int turn, int warp, uint32_t valid) {
  storage.valid[turn][warp] = static_cast<unsigned char>(valid);
  mbarrier_arrive(shared_address(&storage.valid_full[turn]));
}

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm100::sparse_attention_paired
