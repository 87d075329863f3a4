// Shared-memory map of the sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a row,
// whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention/config.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
struct Storage {
  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[C::kPlaces * C::kQuarterBytes];
  // The tile's probabilities, and before them the RoPE columns where they are no part of the values: those are dead
  // once they are scored.
  alignas(1024) unsigned char tail[C::kSliceBytes];
  // Parts of the next tile's rows as they are in memory: those of the warp's keys.
  alignas(16) unsigned char left[C::kProducerWarps][C::kWarpKeys][C::kLeftBytes];
  alignas(16) unsigned char right[C::kProducerWarps][C::kWarpKeys][C::kRightBytes];
  alignas(16) unsigned char scales[2][C::kProducerWarps][C::kWarpKeys][C::kScaleBytes];  // by turns
  uint64_t rows[C::kProducerWarps][C::kWarpKeys];  // where the rows of the next tile are in memory
  float row_max[C::kRows];                         // the reference maximum that both math warpgroups scale by, base 2
  float row_sum[2][2][C::kRows];                   // by parity of the piece, by warpgroup
  alignas(8) unsigned char valid[2][C::kProducerWarps];  // by parity of the tile: a bit for each key that counts
  PieceFacts pieces[2];                                  // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[C::kPlaces];
  uint64_t k_empty[C::kPlaces];
  uint64_t tail_empty;
  uint64_t q_full, q_empty;
  uint64_t probabilities_full;  // and the reference maximum they are relative to
  uint64_t row_sums_full;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention
