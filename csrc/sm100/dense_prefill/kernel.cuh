// CUTLASS's Blackwell FMHA (example 77 of its package), put together for packed sequences of a plan.
#pragma once

#include <cutlass/device_kernel.h>

#include <collective/fmha_fusion.hpp>
// It uses the one above without including it.
#include <collective/sm100_fmha_fwd_epilogue_tma_warpspecialized.hpp>
#include <kernel/sm100_fmha_fwd_kernel_tma_warpspecialized.hpp>

#include "sm100/cutlass_type.h"
#include "sm100/dense_prefill/mainloop.cuh"
#include "sm100/dense_prefill/mask.cuh"
#include "sm100/dense_prefill/scheduler.cuh"

namespace flash_mla::sm100::dense_prefill {

// Query heads of a key head, key heads; sequences. Strides are of 64 bits: CUTLASS multiplies them with token counts.
using HeadsShape = cute::tuple<cute::tuple<int, int>, int>;
using StrideQ = cute::tuple<int64_t, cute::_1, cute::tuple<cute::tuple<int64_t, int64_t>, int64_t>>;
using StrideKV = cute::tuple<int64_t, cute::_1, cute::tuple<cute::tuple<cute::_0, int64_t>, int64_t>>;
using StrideLse = cute::tuple<cute::_1, cute::tuple<cute::tuple<int64_t, int64_t>, int64_t>>;

template <class T, int kHeadDim>
struct Fmha {
  static_assert(kHeadDim == 192 || kHeadDim == 128);
  static constexpr bool kMla = kHeadDim == 192;
  using Element = CutlassType<T>;
  using Length = cutlass::fmha::collective::VariableLength;
  using HeadDims = std::conditional_t<kMla, cute::tuple<int, int>, int>;
  using Problem = cute::tuple<Length, Length, HeadDims, HeadsShape, int>;
  static_assert(cute::tuple_size<Problem>::value == kCausalMode + 1);

  using TileMla = cute::Shape<cute::_256, cute::_128, cute::Shape<cute::_128, cute::_64>>;
  using TilePlain = cute::Shape<cute::_256, cute::_128, cute::_128>;
  using Base = std::conditional_t<kMla,
                                  cutlass::fmha::collective::Sm100MlaFwdMainloopTmaWarpspecialized<
                                      Element, float, float, TileMla, StrideQ, StrideKV, StrideKV, Mask>,
                                  cutlass::fmha::collective::Sm100FmhaFwdMainloopTmaWarpspecialized<
                                      Element, float, float, TilePlain, StrideQ, StrideKV, StrideKV, Mask>>;
  using Mainloop = dense_prefill::Mainloop<Base>;
  using Epilogue =
      cutlass::fmha::collective::Sm100FmhaFwdEpilogueTmaWarpspecialized<Element, float, typename Mainloop::TileShapePV,
                                                                        StrideQ, StrideLse>;
  using Schedule = std::conditional_t<kMla, cutlass::fmha::kernel::Sm100MlaFwdCtxKernelWarpspecializedSchedule,
                                      cutlass::fmha::kernel::Sm100FmhaCtxKernelWarpspecializedSchedule>;
  using Kernel =
      cutlass::fmha::kernel::Sm100FmhaFwdKernelTmaWarpspecialized<Problem, Mainloop, Epilogue, PlannedTile, Schedule>;
};

}  // namespace flash_mla::sm100::dense_prefill
