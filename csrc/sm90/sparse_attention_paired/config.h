// Compile-time facts of the paired sparse attention kernels: what each of two CTAs has of a list's rows and keys.
#pragma once

#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_>
struct Config {
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kRopeBehindValues || kRopeInValues;

  static constexpr bool kStartsEarly = true;  // before the kernels before it have ended, where lists are cut evenly
  static constexpr bool kMakesTileBeforeQ = true;  // of a piece, where Q is still that of the piece before
  static constexpr bool kPrefetchesQ = true;       // of the next piece
  static constexpr int kRanks = 2;                 // CTAs that share the columns of a row
  static constexpr int kRows = 2 * kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  // Of each row of Q and of the keys: 256 columns of the values, and 32 of the RoPE columns behind them.
  static constexpr int kSlices = 4;
  static constexpr int kSliceBytes = 64 * 128, kRopeSlice = kSlices - 1;
  static constexpr int kRopeOffset = kSlices * kSliceBytes, kRopeRowBytes = 64;
  static constexpr int kTileBytes = kRopeOffset + (kRopeBehindValues ? 64 * kRopeRowBytes : 0);
  static constexpr int kStages = 3;

  static constexpr int kMathThreads = 256;
  static constexpr int kProducerWarps = 8;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProducerThreads;
  // Registers per thread after the roles part: 2 * 128 * 208 + 2 * 128 * 48 = 64 K.
  static constexpr int kMathRegisters = 208;
  static constexpr int kProducerRegisters = 48;
};

}  // namespace flash_mla::sm90::sparse_attention_paired
