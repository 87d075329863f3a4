// Compile-time facts of the sparse attention kernels: tile shapes, roles, groups of columns.
#pragma once

#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention {

// A key tile is filled, scored and released in groups of columns: four of 128, and one of 64 (RoPE) that is copied as it
// is. MODEL1 has the RoPE columns in place of the last 64 of group 3.
enum Group : int { kQuarter0 = 0, kQuarter1, kQuarter2, kQuarter3, kRope, kNumGroups };

// The order in which the products release groups, so the order in which they are scored. RoPE columns arrive last: their
// copies start when the slot is free, those of the others before.
constexpr int score_order(int i) {
  constexpr int kOrder[kNumGroups] = {kQuarter0, kQuarter2, kQuarter1, kQuarter3, kRope};
  return kOrder[i];
}

template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_>
struct Config {
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCopied = kFormat == KVFormat::kBf16;  // no conversion
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kRopeBehindValues || kRopeInValues;

  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSliceBytes = 64 * 128;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 256;
  static constexpr int kProducerThreads = 256;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part: 2 * 128 * 200 + 2 * 128 * 56 = 64 K.
  static constexpr int kMathRegisters = 192;
  static constexpr int kProducerRegisters = 64;

  static constexpr int first_slice(int group) { return group == kRope ? kRopeSlice : 2 * group; }
  static constexpr int num_slices(int group) {
    return group == kRope ? (kHasRope ? 1 : 0) : group == kQuarter3 && kRopeInValues ? 1 : 2;
  }
  // Groups that the math warps see written by asynchronous copies of other threads.
  static constexpr bool is_copied(int group) { return kCopied || group == kRope; }
};

constexpr int kProducerWarps = 8;
constexpr int kWarpsPerQuarter = 2;

// Orders the two math warpgroups' scores; no data goes with it.
constexpr int kScores0Issued = 1;
constexpr int kFirstProducerBarrier = 2;  // one for each producer warp

}  // namespace flash_mla::sm90::sparse_attention
