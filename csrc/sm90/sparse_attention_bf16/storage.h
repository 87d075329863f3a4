// Shared-memory map of the sparse attention kernel over bfloat16 rows. Slices are 64 rows x 64 columns, 128 bytes a
// row, whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention_bf16/config.h"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <class C>
struct Storage {
  static constexpr int kProbabilityTiles = C::kHasRope ? 1 : 3;  // d_qk 576: slot 0's live in its RoPE slice

  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityTiles][C::kSliceBytes];
  float row_max[C::kRows];         // the reference maximum that both math warpgroups scale by, base 2
  float row_maximum[2][C::kRows];  // by parity of the piece: the largest score of warpgroup 1's tiles, base 2
  float row_sum[2][2][C::kRows];   // by parity of the piece, by warpgroup
  alignas(8) uint16_t valid[2][C::kProducerWarps];  // of a slot: a bit for each key that counts
  PieceFacts pieces[2];                             // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[2];
  uint64_t k_empty[2][kNumGroups];
  uint64_t q_full, q_empty;
  uint64_t probabilities_full[2];  // of a slot (slot 1: of 32 keys), and the reference maximum they are relative to
  uint64_t second_half_full;       // the probabilities of slot 1's other keys
  uint64_t row_sums_full;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention_bf16
