// Shared-memory map of the sparse attention kernels for few heads. Slices are rows of 64 columns of bfloat16, 128 bytes
// a row, whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention_few_heads/config.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <class C>
struct Storage {
  // Probabilities lie in the tile's RoPE slice where that is no part of the values: it is dead once it is scored.
  static constexpr int kProbabilityBytes = C::kRopeBehindValues ? 0 : C::kQSliceBytes;
  static constexpr int kMathWarps = C::kMathThreads / 32;

  alignas(1024) unsigned char q[C::kSlices * C::kQSliceBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityBytes + 16];
  // Rows as they are in memory, of the tile behind the one that is converted: the warp's keys.
  alignas(16) unsigned char ring[C::kProducerWarps][C::kKeys / C::kProducerWarps][C::kRingRowBytes];
  float row_max[kMathWarps][C::kRows];  // largest scores, base 2, by math warp
  float row_sum[kMathWarps][C::kRows];
  alignas(8) unsigned char valid[2][C::kProducerWarps];  // of a slot: a bit for each key that counts
  PieceFacts pieces[2];                                  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[2];
  uint64_t k_empty[2];
  uint64_t q_full, q_empty;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
