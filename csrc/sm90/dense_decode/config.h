// Compile-time facts of the dense decode kernel: tile shapes, roles, the order in which slices move.
#pragma once

#include <cstdint>

#include "core/params/dense_decode.h"

namespace flash_mla::sm90::dense_decode {

// A key tile is loaded and released in groups of 64-column slices. Group kRope exists for d_qk 576 only.
enum Group : int { kRope = 0, kCols0 = 1, kCols128 = 2, kCols256 = 3, kCols384 = 4, kNumGroups = 5 };

template <class T, int kHeadDim>
struct Config {
  using Element = T;
  static constexpr bool kHasRope = kHeadDim > kHeadDimV;

  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = 64;
  static constexpr int kSliceBytes = 64 * 128;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;

  static constexpr int kThreads = 384;
  static constexpr int kMathThreads = 256;
  // Registers per thread after the roles part: 2 * 128 * 224 + 128 * 56 <= 64 K.
  static constexpr int kMathRegisters = 224;
  static constexpr int kProducerRegisters = 56;

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

// Who runs where.
constexpr int kTmaWarp = 0;       // of the producer warpgroup
constexpr int kFirstRowWarp = 1;  // two warps load Q, partial tiles and pages that TMA cannot tile
constexpr int kNumRowWarps = 2;

// Orders the two warpgroups' scores; no data goes with it.
constexpr int kScores0Issued = 1;

}  // namespace flash_mla::sm90::dense_decode
