// Shared-memory map of the paired sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a
// row, whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention_paired/config.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C>
struct Storage {
  alignas(1024) unsigned char q[C::kTileBytes];  // of the CTA's rows
  alignas(1024) unsigned char k[C::kPlaces * C::kQuarterBytes];
  // The tile's probabilities, and before them the RoPE columns where they are no part of the values: those are dead
  // once they are scored.
  alignas(1024) unsigned char tail[C::kSliceBytes];
  // The next tile's rows as they are in memory: a half of the warp's keys, and their scales.
  alignas(16) unsigned char half[C::kProducerWarps][C::kWarpKeys][C::kHalfBytes];
  alignas(16) unsigned char rope[C::kHasRope ? C::kSideWarps : 1][C::kWarpKeys][128];
  alignas(16) unsigned char scales[C::kProducerWarps][C::kWarpKeys][C::kScaleBytes];
  uint64_t rows[C::kProducerWarps][C::kWarpKeys];  // where the rows of the next tile are in memory
  uint64_t scale_rows[C::kScalesApart ? C::kProducerWarps : 1][C::kWarpKeys];  // and their scales, where elsewhere
  float row_max[kRowTile];         // the reference maximum that both math warpgroups scale by, base 2
  float row_sum[2][2][kRowTile];   // by parity of the piece, by warpgroup
  float row_maximum[2][kRowTile];  // by parity of the piece: of warpgroup 1's tiles, where asked for
  alignas(16) uint32_t valid[2][C::kRanks * C::kSideWarps];  // by parity of the tile: a bit for each key that counts
  PieceFacts pieces[2];                                      // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t k_full[C::kPlaces];
  uint64_t k_empty[C::kPlaces];  // in both CTAs
  uint64_t tail_empty;           // in both CTAs
  uint64_t q_full, q_empty;
  uint64_t probabilities_full;  // and the reference maximum they are relative to
  uint64_t row_sums_full;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention_paired
