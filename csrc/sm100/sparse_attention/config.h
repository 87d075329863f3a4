// Compile-time facts of the sparse attention kernels: tile shapes, roles, where things are in tensor memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "core/params/sparse_attention.h"
#include "device/slices.h"
#include "device/sm100/umma.h"
#include "device/sparse/walk.h"

namespace flash_mla::sm100::sparse_attention {

// kBf16: rows of 16-bit values, `Element`, that are copied as they are.
template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_, class Element_ = __nv_bfloat16>
struct Config {
  using Element = Element_;
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCopiesRows = kFormat == KVFormat::kBf16;
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;
  static constexpr bool kHasRope = kRopeBehindValues || kRopeInValues;

  static constexpr int kRanks = 1;
  static constexpr int kRows = kRowTile;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSliceBytes = 64 * kSliceRowBytes, kQSliceBytes = kSliceBytes;
  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  // Four math warps, four of which one issues products, eight producers.
  static constexpr int kMathThreads = 128, kProductThreads = 128;
  static constexpr int kProducerWarps = 8;
  static constexpr int kProducerThreads = 32 * kProducerWarps;
  static constexpr int kThreads = kMathThreads + kProductThreads + kProducerThreads;
  // Registers per thread after the roles part: 128 * (224 + 80 + 2 * 104) = 64 K.
  static constexpr int kMathRegisters = 224, kProductRegisters = 80, kProducerRegisters = 104;

  // A result of 64 rows takes 16 of every 32 lanes. The output has all columns of the lower halves, the scores of both
  // slots lie in the upper halves.
  static constexpr uint32_t kOutput = 0;
  static constexpr uint32_t scores(int slot) { return tmem_lane(16) + slot * kKeys; }
  static constexpr int kProductColumns = 256;  // of the output, by one instruction

  static constexpr int first_slice(int part) { return part == kRope ? kRopeSlice : 0; }
  static constexpr int num_slices(int part) {
    return part == kRope ? (kHasRope ? 1 : 0) : kSlices - (kHasRope ? 1 : 0);
  }
};

}  // namespace flash_mla::sm100::sparse_attention
