// Compile-time facts of the backward of dense prefill: tile shapes, roles, instructions.
#pragma once

#include <cstdint>

#include "core/params/dense_prefill_backward.h"
#include "device/sm90/wgmma.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

template <class T, int kHeadDim>
struct Config {
  using Element = T;
  static constexpr int kWarpgroups = 2;  // of math, 64 keys each
  static constexpr int kWarpgroupKeys = 64;
  static constexpr int kKeys = kWarpgroups * kWarpgroupKeys;
  static constexpr int kQueries = 64;
  static constexpr int kStages = 2;  // of Q and the output's gradient
  static_assert(kKeys == kBackwardKeyTile && kQueries == kBackwardQueryTile);

  static constexpr int kColumns = kHeadDim;
  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static constexpr int kValueSlices = kPrefillHeadDimV / kSliceColumns;
  static constexpr int kKeySliceBytes = kKeys * kSliceRowBytes;
  static constexpr int kQuerySliceBytes = kQueries * kSliceRowBytes;
  static constexpr int kKBytes = kSlices * kKeySliceBytes;
  static constexpr int kVBytes = kValueSlices * kKeySliceBytes;
  static constexpr int kQBytes = kSlices * kQuerySliceBytes;
  static constexpr int kOutBytes = kValueSlices * kQuerySliceBytes;
  static constexpr int kDsBytes = kKeySliceBytes;  // 128 keys x 64 queries

  // The gradient of Q is shared out by columns: a warpgroup's half of them takes 1.5 slices of K where there are three.
  // It begins with a slice of its own, at position `warpgroup`, and ends in half of the last one, which both share.
  static constexpr int kDqColumns = kHeadDim / kWarpgroups;
  static constexpr int kDqSlices = kDqColumns / 32;  // of float32: 128 bytes
  static constexpr int kDqBytes = kDqSlices * kQuerySliceBytes;
  static constexpr int slice_position(int slice) { return kSlices == 3 ? (3 - slice) % 3 : slice; }
  static constexpr int dq_leading(int warpgroup) {
    return warpgroup == 0 ? (kSlices - 1) * kKeySliceBytes : kKeySliceBytes + kSliceRowBytes / 2;
  }
  // Where the float32 slices of its result lie among its columns.
  static constexpr int dq_slice(int warpgroup, int slice) {
    return kSlices == 3 && warpgroup == 1 ? (slice + 1) % 3 : slice;
  }

  static constexpr int kMathThreads = 128 * kWarpgroups;
  static constexpr int kThreads = kMathThreads + 128;
  // Registers per thread after the roles part: 256 * 240 + 128 * 24 <= 384 * 168, what the launch allots.
  static constexpr int kMathRegisters = 240;
  static constexpr int kProducerRegisters = 24;

  // How much of a step's arithmetic overlaps is a matter of registers. The exponentials of so many groups of 16 queries
  // come before the gradients of the probabilities are issued; so many such groups of the gradient of K are issued
  // before that of Q, and waited for unless they overlap with it.
  static constexpr int kExponentsFirst = kHeadDim == 192 ? 4 : 0;
  static constexpr int kKeyGradientFirst = kHeadDim == 128 ? 2 : std::is_same_v<T, __half> ? 4 : 3;
  static constexpr bool kKeyGradientOverlaps = kHeadDim == 128;

  using Major = cute::SM90::GMMA::Major;
  static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  // Scores and gradients of probabilities, transposed: 64 keys x 64 queries.
  using Scores = typename WgmmaAtoms<T>::Scores;
  // Gradient of V: 64 keys x 128 columns. A, 64 keys x 16 queries, from registers, B with the column contiguous.
  using ValueGradient = typename WgmmaAtoms<T>::OutputRS;
  using WideKeyGradient = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x192x16_F32BF16BF16_RS<Major::K, Major::MN>,
                                             cute::SM90::GMMA::MMA_64x192x16_F32F16F16_RS<Major::K, Major::MN>>;
  using KeyGradient = std::conditional_t<kHeadDim == 192, WideKeyGradient, ValueGradient>;
  // Gradient of Q: 64 queries x a half of the columns. Both operands have the inner dimension, keys, by rows.
  using WideQueryGradient =
      std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x96x16_F32BF16BF16_SS<Major::MN, Major::MN>,
                         cute::SM90::GMMA::MMA_64x96x16_F32F16F16_SS<Major::MN, Major::MN>>;
  using NarrowQueryGradient =
      std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::MN, Major::MN>,
                         cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::MN, Major::MN>>;
  using QueryGradient = std::conditional_t<kHeadDim == 192, WideQueryGradient, NarrowQueryGradient>;
};

// Warps of the producer warpgroup.
constexpr int kTmaWarp = 0;
constexpr int kSchedulerWarp = 1;
constexpr int kRowWarp = 2;
constexpr int kAdderWarp = 3;

}  // namespace flash_mla::sm90::dense_prefill_backward
