// A key tile that arrives and is released piece by piece, in groups of 64-column slices.
#pragma once

#include <cstdint>

namespace flash_mla::sm90 {

// Group kRope exists for d_qk 576 only.
enum Group : int { kRope = 0, kCols0 = 1, kCols128 = 2, kCols256 = 3, kCols384 = 4, kNumGroups = 5 };

template <bool kHasRope>
struct KeyGroups {
  static constexpr int first_slice(int group) { return group == kRope ? 8 : 2 * (group - 1); }
  static constexpr int num_slices(int group) { return group == kRope ? (kHasRope ? 1 : 0) : 2; }

  // The order in which the products of one step release a slot's slices, so the order in which they are loaded and
  // scored. Slot 0 keeps its probabilities in the RoPE slice, which therefore comes free last.
  static constexpr int load_order(int slot, int i) {
    constexpr uint32_t kOrder[2] = {kCols0 | kCols128 << 3 | kCols256 << 6 | kCols384 << 9 | kRope << 12,
                                    kRope | kCols256 << 3 | kCols0 << 6 | kCols384 << 9 | kCols128 << 12};
    return (slot == 0 ? kOrder[0] : kOrder[1]) >> (3 * i) & 7;
  }
};

}  // namespace flash_mla::sm90
