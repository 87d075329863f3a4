// Shared-memory map of the sparse attention kernels. Slices are 64 rows x 64 columns of bfloat16, 128 bytes a row,
// whose 16-byte units are permuted by the row.
#pragma once

#include "device/sparse/walk.h"
#include "sm90/sparse_attention/config.h"

namespace flash_mla::sm90::sparse_attention {

// Rows are sent for ahead of the products.
constexpr int kValidTurns = 4;

template <class C>
struct Storage {
  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[C::kPlaces * C::kQuarterBytes];
  // The tile's probabilities, and before them the RoPE columns where they are no part of the values: those are dead
  // once they are scored.
  alignas(1024) unsigned char tail[C::kSliceBytes];
  // Halves of the next tile's rows as they are in memory, by the warp that brings them.
  alignas(16) unsigned char left[C::kSenders][C::kSenderKeys][C::kLeftBytes];
  alignas(16) unsigned char right[C::kSenders][C::kSenderKeys][C::kRightBytes];
  alignas(16) unsigned char scales[2][C::kSenders][C::kSenderKeys][C::kScaleBytes];  // by turns
  uint64_t rows[C::kSenders][C::kSenderKeys];  // where the rows of the next tile are in memory
  uint64_t scale_rows[C::kScalesApart ? C::kSenders : 1][C::kSenderKeys];  // and their scales, where elsewhere
  float row_max[C::kRows];        // the reference maximum that both math warpgroups scale by, base 2
  float row_sum[2][2][C::kRows];  // by parity of the piece, by warpgroup
  alignas(8) uint16_t valid[kValidTurns][C::kSenders];  // of a tile, by turns: a bit for each key that counts
  PieceFacts pieces[2];                                 // by parity of the piece
  Walk walks[C::kSenders];
  uint32_t entries[2][C::kSenders];  // struct Entry of what is sent for, by turns
  uint64_t k_full[C::kPlaces];
  uint64_t k_empty[C::kPlaces];
  uint64_t told[2][C::kSenders];
  uint64_t left_full[C::kSenders], left_empty[C::kSenders];
  uint64_t right_full[C::kSenders], right_empty[C::kSenders];
  uint64_t tail_empty;
  uint64_t q_full, q_empty;
  uint64_t probabilities_full;  // and the reference maximum they are relative to
  uint64_t row_sums_full;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::sparse_attention
