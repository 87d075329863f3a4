// Compile-time facts of the backward of sparse prefill: tile shapes, roles, instructions.
#pragma once

#include <cstdint>

#include "core/params/sparse_prefill_backward.h"
#include "device/sm90/wgmma.cuh"

namespace flash_mla::sm90::sparse_prefill_backward {

template <int kHeadDim, bool kFixed>
struct Config {
  static constexpr bool kFixedPoint = kFixed;  // sums of 64-bit integers instead of float32
  static constexpr int kHeads = kRowTile;
  static_assert(kHeads == 64);
  static constexpr int kKeys = 64;
  static constexpr int kColumns = kHeadDim;
  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static constexpr int kValueSlices = kHeadDimV / kSliceColumns;
  static constexpr int kSliceBytes = 64 * kSliceRowBytes;

  // A warpgroup of math has these slices of the columns of both gradients: four, and the others.
  static constexpr int kWarpgroups = 2;
  static constexpr int kFirstSlices = 4;
  static constexpr int first_slice(int warpgroup) { return warpgroup * kFirstSlices; }
  static constexpr int num_slices(int warpgroup) { return warpgroup == 0 ? kFirstSlices : kSlices - kFirstSlices; }

  static constexpr int kMathThreads = 128 * kWarpgroups;
  static constexpr int kProducerWarps = 4;
  static constexpr int kWarpKeys = kKeys / kProducerWarps;
  static constexpr int kThreads = kMathThreads + 32 * kProducerWarps;
  // Registers per thread after the roles part: 256 * 232 + 128 * 40 = 384 * 168, what the launch allots.
  static constexpr int kMathRegisters = 232;
  static constexpr int kProducerRegisters = 40;

  using Major = cute::SM90::GMMA::Major;
  // Scores and gradients of probabilities: 64 heads x 64 keys.
  using Scores = WgmmaAtoms<__nv_bfloat16>::Scores;
  // Gradient of q: 64 heads x four slices, or one; keys are the inner dimension.
  using QueryGradient = cute::SM90::GMMA::MMA_64x256x16_F32BF16BF16_SS<Major::K, Major::MN>;
  using LastQueryGradient = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::MN>;
  // Gradient of the keys: 64 keys x a slice; both operands have the inner dimension, heads, by rows.
  using KeyGradient = cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::MN, Major::MN>;
};

}  // namespace flash_mla::sm90::sparse_prefill_backward
