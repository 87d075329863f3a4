// Compile-time facts of the dense prefill kernel: tile shapes, roles, instructions.
#pragma once

#include <cstdint>

#include "core/params/dense_prefill.h"
#include "device/sm90/wgmma.cuh"

namespace flash_mla::sm90::dense_prefill {

template <class T, int kHeadDim>
struct Config {
  using Element = T;
  static constexpr int kWarpgroups = 2;  // of math, 64 query rows each
  static constexpr int kWarpgroupRows = 64;
  static constexpr int kRows = kWarpgroups * kWarpgroupRows;
  static constexpr int kKeys = 128;
  static constexpr int kStages = 2;  // of K, and of V
  static_assert(kRows == prefill_row_tile(90));

  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static constexpr int kValueSlices = kPrefillHeadDimV / kSliceColumns;
  static constexpr int kQSliceBytes = kWarpgroupRows * kSliceRowBytes;
  static constexpr int kKeySliceBytes = kKeys * kSliceRowBytes;
  static constexpr int kQBytes = kSlices * kQSliceBytes;  // of one warpgroup
  static constexpr int kKBytes = kSlices * kKeySliceBytes;
  static constexpr int kVBytes = kValueSlices * kKeySliceBytes;

  static constexpr int kMathThreads = 128 * kWarpgroups;
  static constexpr int kThreads = kMathThreads + 128;
  // Registers per thread after the roles part: 256 * 232 + 128 * 40 <= 64 K.
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  // Scores: 64 rows x 128 keys, both operands with the inner dimension contiguous. Output: 64 rows x 128 columns, the
  // probabilities from registers, the values with the column contiguous.
  using Major = cute::SM90::GMMA::Major;
  using Scores = std::conditional_t<std::is_same_v<T, __nv_bfloat16>,
                                    cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::K>,
                                    cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<Major::K, Major::K>>;
  // The first half of the keys only.
  using HalfScores = typename WgmmaAtoms<T>::Scores;
  using Output = typename WgmmaAtoms<T>::OutputRS;
};

// Warps of the producer warpgroup.
constexpr int kTmaWarp = 0;
constexpr int kSchedulerWarp = 1;
constexpr int kCleanerWarp = 2;

}  // namespace flash_mla::sm90::dense_prefill
