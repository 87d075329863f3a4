// Compile-time facts of the sparse attention kernel over bfloat16 rows: tile shapes, roles.
#pragma once

#include <cuda_bf16.h>

#include "core/params/sparse_attention.h"
#include "sm90/key_groups.h"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <int kHeadDim>
struct Config : KeyGroups<(kHeadDim > kHeadDimV)> {
  using Element = __nv_bfloat16;
  static constexpr KVFormat kFormat = KVFormat::kBf16;
  static constexpr bool kHasRope = kHeadDim > kHeadDimV;

  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSliceBytes = 64 * 128, kQSliceBytes = kSliceBytes;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;

  static constexpr int kMathThreads = 256;
  static constexpr int kProducerWarps = 4;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part: 2 * 128 * 216 + 128 * 72 <= 64 K.
  static constexpr int kMathRegisters = 216;
  static constexpr int kProducerRegisters = 72;
};

// With this group of a slot comes which of its keys are valid. The warpgroup that reads that is the one that releases
// the group, and later than it reads.
constexpr int valid_group(int slot) { return slot == 0 ? kCols0 : kCols256; }

}  // namespace flash_mla::sm90::sparse_attention_bf16
