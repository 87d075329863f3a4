// Shared-memory map of the sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a row,
// whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention/config.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
struct Storage {
  // Probabilities of slot 0 lie in its RoPE slice where that is no part of the values: it is dead once it is scored.
  static constexpr int kProbabilityTiles = C::kRopeBehindValues ? 1 : 3;

  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityTiles][C::kSliceBytes];
  float row_max[C::kRows];        // the reference maximum that both math warpgroups scale by, base 2
  float row_sum[2][2][C::kRows];  // by parity of the piece, by warpgroup
  alignas(8) unsigned char valid[2][C::kProducerWarps];  // of a slot: a bit for each key that counts
  PieceFacts pieces[2];                                  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[2][kNumParts];
  uint64_t k_empty[2];
  uint64_t q_full, q_empty;
  uint64_t probabilities_full[2];  // of a slot, and the reference maximum they are relative to
  uint64_t row_sums_full;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention
