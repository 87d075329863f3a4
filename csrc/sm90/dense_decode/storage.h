// Shared-memory map of the dense decode kernel. Slices are 64 rows x 64 columns of 16-bit values in TMA's 128-byte
// swizzle.
#pragma once

#include <cuda.h>

#include "sm90/dense_decode/config.h"

namespace flash_mla::sm90::dense_decode {

template <class C>
struct Storage {
  static constexpr int kProbabilityTiles = C::kHasRope ? 1 : 3;  // d_qk 576: slot 0's live in its RoPE slice

  alignas(1024) unsigned char q[C::kTileBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityTiles][C::kSliceBytes];
  float row_max[C::kRows];              // the reference maximum that both math warpgroups scale by, base 2
  float row_sum[2][2][C::kRows];        // by parity of the piece, by warpgroup
  uint32_t expects[2][kPartialGroups];  // of a math warp: its last piece may be joined with the next part's first
  uint64_t k_full[2][kNumGroups];
  uint64_t k_empty[2][kNumGroups];
  uint64_t q_full, q_empty;
  uint64_t probabilities_full[2];  // of a slot (slot 1: of 32 keys), and the reference maximum they are relative to
  uint64_t second_half_full;       // the probabilities of slot 1's other keys
  uint64_t row_sums_full;
  uint64_t written;            // the results of the first piece, where other parts may ask for them
  uint64_t row_warps_turn[2];  // the slot is free, and the row warps are to fill it
};

// How TMA sees the cache: boxes of two slices, and of one for the RoPE columns and for pages of less than a tile.
struct CacheMaps {
  CUtensorMap two_slices, one_slice;
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

}  // namespace flash_mla::sm90::dense_decode
