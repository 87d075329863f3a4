// Compile-time facts of the sparse attention kernels: tile shapes, roles, parts of a tile.
#pragma once

#include <cstdint>

#include "core/params/sparse_attention.h"
#include "device/sparse/walk.h"

namespace flash_mla::sm90::sparse_attention {

template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_>
struct Config {
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kRopeBehindValues || kRopeInValues;

  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr int kRanks = 1;
  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSliceBytes = 64 * 128, kQSliceBytes = kSliceBytes;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 256;
  static constexpr int kProducerWarps = 8;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part: 2 * 128 * 192 + 2 * 128 * 64 = 64 K.
  static constexpr int kMathRegisters = 192;
  static constexpr int kProducerRegisters = 64;

  static constexpr int first_slice(int part) { return part == kRope ? kRopeSlice : 0; }
  static constexpr int num_slices(int part) {
    return part == kRope ? (kHasRope ? 1 : 0) : kSlices - (kHasRope ? 1 : 0);
  }
};

}  // namespace flash_mla::sm90::sparse_attention
