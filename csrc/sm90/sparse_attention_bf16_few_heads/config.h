// Compile-time facts of the sparse attention kernels for few heads over bfloat16 rows: tile shapes, roles.
#pragma once

#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_bf16_few_heads {

// `kRows_`: query rows of a unit at the most, 16 or 32.
template <int kHeadDim_, int kRows_>
struct Config {
  static constexpr KVFormat kFormat = KVFormat::kBf16;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;

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
};

// Named barriers of the math warps.
constexpr int kScoresRead = 1;           // and whether one outgrows the reference
constexpr int kProbabilitiesStored = 2;  // or what else the warps tell each other

}  // namespace flash_mla::sm90::sparse_attention_bf16_few_heads
