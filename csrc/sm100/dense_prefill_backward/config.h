// Compile-time facts of the backward of dense prefill: the parts of CUTLASS, and the roles of warps.
#pragma once

#include <collective/fmha_fusion.hpp>
// It uses the one above without including it.
#include <kernel/sm100_fmha_bwd_mla_kernel_tma_warpspecialized.hpp>

#include "sm100/cutlass_type.h"
#include "sm100/dense_prefill_backward/mask.cuh"

namespace flash_mla::sm100::dense_prefill_backward {

template <class T, int kHeadDim>
struct Config {
  static_assert(kHeadDim == 192 || kHeadDim == 128);
  using Element = CutlassType<T>;
  using ItemShape = Problem<kHeadDim>;
  using Tiles = cute::Shape<cute::Int<kBackwardQueryTile>, cute::Int<kBackwardKeyTile>, cute::Int<kHeadDim>,
                            cute::Int<kPrefillHeadDimV>>;
  // Named after MLA, but it asks nothing of the head dims.
  using Cutlass =
      cutlass::fmha::kernel::Sm100FmhaBwdMlaKernelTmaWarpSpecialized<ItemShape, Element, float, Tiles, Mask>;
  static constexpr int kThreads = Cutlass::MaxThreadsPerBlock;

  // Slices of 128 bytes.
  static constexpr int kSlices = kHeadDim / 64, kValueSlices = kPrefillHeadDimV / 64, kSumSlices = kHeadDim / 32;
};

// CUTLASS's numbers are part of its code: math is done by the warps 4 to 11 of the CTA, and tensor memory read by warps
// whose number modulo 4 says which quarter they reach.
enum class Role { kAdd, kMath, kProducts, kLoad, kRowTerms, kNone };

__device__ __forceinline__ Role role_of(int warp) {
  return warp < 4     ? Role::kAdd
         : warp < 12  ? Role::kMath
         : warp == 12 ? Role::kProducts
         : warp == 13 ? Role::kLoad
         : warp == 14 ? Role::kRowTerms
                      : Role::kNone;
}

}  // namespace flash_mla::sm100::dense_prefill_backward
