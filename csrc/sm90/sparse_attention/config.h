// Compile-time facts of the sparse attention kernels: tile shapes, roles, parts of a tile and of a row.
#pragma once

#include <algorithm>
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
  static constexpr bool kRopeQuantised = kFormat == KVFormat::kE4m3;

  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr bool kMakesTileBeforeQ = true;  // of a piece, where Q is still that of the piece before
  static constexpr bool kPrefetchesQ = true;       // of the next piece
  static constexpr int kRanks = 1;
  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSliceBytes = 64 * 128, kQSliceBytes = kSliceBytes;
  static constexpr int kSlices = kHeadDim / 64;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 256;
  static constexpr int kProducerWarps = 8;  // that convert
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kSenders = 4;  // warps that bring rows
  static constexpr int kSenderKeys = kKeys / kSenders;
  static constexpr int kThreads = kMathThreads + kProducerThreads + 32 * kSenders;
  // Registers per thread after the roles part. They come from those that the kernel starts with: were they too few, the
  // last role to ask would wait for ever.
  static constexpr int kScoringRegisters = 192, kMultiplyingRegisters = 176;
  static constexpr int kProducerRegisters = 40, kSenderRegisters = 24;
  static constexpr int kFirstRegisters = 65536 / kThreads / 8 * 8;
  static_assert(kMathThreads / 2 * (kScoringRegisters + kMultiplyingRegisters) + kProducerThreads * kProducerRegisters +
                    32 * kSenders * kSenderRegisters <=
                kThreads * kFirstRegisters);

  // A tile is converted, scored, multiplied and handed back by quarters of the values, which lie in a ring of places.
  static constexpr int kQuarters = 4, kPlaces = kRopeBehindValues ? 6 : 7;
  static constexpr int kQuarterBytes = 2 * kSliceBytes;

  // Of a row as it is in memory: the left half of the values, what follows it without the scales, and the scales.
  static constexpr KVLayout kLayout = layout_of(kFormat);
  static constexpr int kLeftBytes = 256;
  static constexpr int kRightBytes = (kLayout.value_bytes() + (kRopeQuantised ? 1 : 2) * kLayout.rope()) - kLeftBytes;
  static constexpr bool kScalesApart =
      kLayout.scales_behind_page || (kExtraFormat != KVFormat::kNone && layout_of(kExtraFormat).scales_behind_page);
  static constexpr int kScaleBytes = std::max(
      {16, kLayout.scale_bytes(), kExtraFormat == KVFormat::kNone ? 0 : layout_of(kExtraFormat).scale_bytes()});
};

// The keys as the warps have them that bring their rows.
template <class C>
struct SenderConfig : C {
  static constexpr int kProducerWarps = C::kSenders;
};

}  // namespace flash_mla::sm90::sparse_attention
