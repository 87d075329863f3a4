// Compile-time facts of the paired sparse attention kernels: what each of two CTAs that multiply together has, roles,
// where things are in tensor memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/params/sparse_attention.h"
#include "device/slices.h"
#include "device/sm100/umma.h"
#include "device/sparse/walk.h"

namespace flash_mla::sm100::sparse_attention_paired {

// kBf16: rows of 16-bit values, `Element`, that are copied as they are.
template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_, class Element_ = __nv_bfloat16>
struct Config {
  using Element = Element_;
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCopiesRows = kFormat == KVFormat::kBf16;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kHeadDim > kHeadDimV || kRopeInValues;

  static constexpr int kRanks = 1;            // no CTA has a part of a row of Q only
  static constexpr int kRows = 2 * kRowTile;  // of the pair
  static constexpr int kKeys = kScheduleBlock;
  // A CTA has 64 rows of Q; of a tile all columns of half of the keys, for the scores, and half of the values' columns
  // of all keys.
  static constexpr int kOwnKeys = kKeys / 2;
  static constexpr int kSlices = kHeadDim / kSliceColumns, kValueSlices = kHeadDimV / kSliceColumns / 2;
  static constexpr int kSliceBytes = 64 * kSliceRowBytes, kQSliceBytes = kSliceBytes;
  static constexpr int kKeySliceBytes = kOwnKeys * kSliceRowBytes;
  static constexpr int kKeyBytes = kSlices * kKeySliceBytes, kValueBytes = kValueSlices * kSliceBytes;
  static constexpr int kTensorQSlices = 6, kSharedQSlices = kSlices - kTensorQSlices;

  // Four math warps, four of which one issues products, eight producers.
  static constexpr int kMathWarps = 4, kMathThreads = 32 * kMathWarps, kProductThreads = 128;
  static constexpr int kProducerWarps = 8;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProductThreads + kProducerThreads;
  // Registers per thread after the roles part: 128 * (224 + 80 + 2 * 104) = 64 K.
  static constexpr int kMathRegisters = 224, kProductRegisters = 80, kProducerRegisters = 104;

  // A result of the pair has 64 rows in a CTA: lanes 0 to 63 have the first half of its columns, lanes 64 to 127 the
  // second half. A slice of Q takes 32 columns, in both halves of the lanes.
  static constexpr uint32_t kOutput = 0, kProductColumns = 256;  // of the output, by one instruction
  static constexpr uint32_t scores(int slot) { return kHeadDimV / 2 + slot * kKeys / 2; }
  static constexpr uint32_t tensor_q(int slice) {
    return scores(2) + (slice - kSharedQSlices) * static_cast<uint32_t>(kSliceColumns / 2);
  }
  static_assert(kHeadDimV / 2 + kKeys + kTensorQSlices * kSliceColumns / 2 <= kTmemColumns);
};

}  // namespace flash_mla::sm100::sparse_attention_paired
