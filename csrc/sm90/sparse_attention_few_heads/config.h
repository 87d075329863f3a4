// Compile-time facts of the sparse attention kernels for few heads: tile shapes, roles.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// `kRows_`: query rows of a unit at the most, 16 or 32.
template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_, int kRows_>
struct Config {
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCopied = kFormat == KVFormat::kBf16;  // rows go straight to their places
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;

  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kQSliceBytes = kRows * 128;
  static constexpr int kSliceBytes = kKeys * 128;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 128;
  static constexpr int kProducerWarps = 8;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part: 128 * 232 + 256 * 96 <= 64 K.
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 96;

  // Bytes of a row as they lie in the ring: the row, and MODEL1's scales behind it.
  static constexpr int ring_row_bytes(KVFormat format) {
    const KVLayout layout = layout_of(format);
    const int bytes = layout.row_stride() + (layout.scales_behind_page ? layout.scale_stride() : 0);
    return ceil_div(bytes, 16) * 16;
  }
  static constexpr int kRingRowBytes =
      std::max({16, ring_row_bytes(kFormat), kExtraFormat == KVFormat::kNone ? 0 : ring_row_bytes(kExtraFormat)});
};

// Named barriers of the math warps.
constexpr int kScoresRead = 1;           // and whether one outgrows the reference
constexpr int kProbabilitiesStored = 2;  // or what else the warps tell each other

}  // namespace flash_mla::sm90::sparse_attention_few_heads
