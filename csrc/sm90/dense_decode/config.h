// Compile-time facts of the dense decode kernel: tile shapes, roles, the order in which slices move.
#pragma once

#include <cstdint>

#include "core/params/dense_decode.h"
#include "sm90/key_groups.h"

namespace flash_mla::sm90::dense_decode {

template <class T, int kHeadDim>
struct Config : KeyGroups<(kHeadDim > kHeadDimV)> {
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
};

// Who runs where.
constexpr int kTmaWarp = 0;        // of the producer warpgroup
constexpr int kSecondTmaWarp = 3;  // slot 1 has its own where each slot has one
constexpr int kFirstRowWarp = 1;   // two warps load Q, partial tiles and pages that TMA cannot tile
constexpr int kNumRowWarps = 2;

}  // namespace flash_mla::sm90::dense_decode
