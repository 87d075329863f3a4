// Compile-time facts of the sparse attention kernels that keep FP8 rows as they are in shared memory: tile shapes,
// roles, the ring of rows.
#pragma once

#include <algorithm>
#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// Math warpgroups. Each scores every fourth tile and keeps a quarter of the output's columns.
constexpr int kSides = 4;
// A tile is scored while the one so many before it is multiplied: earlier, and fewer tiles would be on their way.
constexpr int kAhead = 2;

// `kRows_`: query rows of a unit at the most, 16 or 32.
template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_, int kRows_>
struct Config {
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr bool kTwoFormats = kExtraFormat != KVFormat::kNone && kExtraFormat != kFormat;
  static constexpr KVFormat kSecondFormat = kTwoFormats ? kExtraFormat : kFormat;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kRopeBehindValues || kRopeInValues;

  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kQSliceBytes = kRows * 128;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 128 * kSides;
  static constexpr int kProducerWarps = 4;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part. A CTA of 640 threads starts with 96 each, and has no more than these.
  static constexpr int kMathRegisters = 112;
  static constexpr int kProducerRegisters = 32;
  static_assert(kMathThreads * kMathRegisters + kProducerThreads * kProducerRegisters <= kThreads * 96);

  // Rows come and go 16 at a time: the keys of one step of the output's products.
  static constexpr int kGroupKeys = 16;
  static constexpr int kTileGroups = kKeys / kGroupKeys;
  static constexpr int kGroupBytes = kGroupKeys * 128;  // of a group's RoPE columns, or of its probabilities

  // From a row's values and scales to the next row's: an odd number of 16-byte units, so that neither reading by rows
  // nor reading by columns meets a bank twice.
  static constexpr int row_bytes(KVFormat format) {
    const KVLayout layout = layout_of(format);
    const int units = ceil_div(layout.value_bytes() + layout.scale_bytes(), 16);
    return (units | 1) * 16;
  }
  static constexpr int kRowBytes = std::max(row_bytes(kFormat), row_bytes(kSecondFormat));
};

// Named barriers of the math warps.
constexpr int kMathWarps = 1;
constexpr int kOutgrown = 2;  // and the next ones: of a warpgroup

// Probabilities are half precision, relative to a reference maximum that is moved when one outgrows 2^kSlack. Then the
// largest is made 2^kTop: what lies 2^-20 below it is still a normal number.
constexpr float kTop = 6;

// Beside the bits of `valid`: the keys are of the second cache, whose format is another.
constexpr uint32_t kOfSecondFormat = 1u << 16;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
