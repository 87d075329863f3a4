#pragma once

#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "sm100/dense_prefill/kernel.cuh"
#include "sm100/dense_prefill/keyless_rows.h"

namespace flash_mla::sm100::dense_prefill {

// A dimension of size 1 may have any stride in torch; TMA wants multiples of 16 bytes all the same.
inline int64_t tma_stride(int64_t stride, int64_t size) { return size > 1 ? stride : kPrefillHeadDimV; }

// The parameters of CUTLASS's kernel. Its own conversion of arguments would take a scale of 0 for none, and make twice
// as many tensor maps.
template <class F>
typename F::Kernel::Params kernel_params(const DensePrefillParams& params) {
  using namespace cute;
  using Element = typename F::Element;
  using Main = typename F::Mainloop;
  const int group = params.group, h_kv = params.h_kv;
  const auto strides = [](int64_t token, int64_t head, int heads_together, int64_t sequence) {
    return StrideQ{token, {}, {{head, head * heads_together}, sequence}};
  };
  const auto kv_strides = [](int64_t token, int64_t head, int64_t sequence) {
    return StrideKV{token, {}, {{{}, head}, sequence}};
  };
  const int64_t q_t = tma_stride(params.stride_q_t, params.tokens_q), q_h = tma_stride(params.stride_q_h, params.h_q);
  const int64_t k_t = tma_stride(params.stride_k_t, params.tokens_kv), k_h = tma_stride(params.stride_k_h, h_kv);
  const int64_t v_t = tma_stride(params.stride_v_t, params.tokens_kv), v_h = tma_stride(params.stride_v_h, h_kv);

  // All sequences are one to TMA: tokens, columns, heads.
  const auto heads = make_shape(make_shape(group, h_kv), 1);
  Tensor q = make_tensor(static_cast<const Element*>(params.q), make_shape(params.tokens_q, params.d_qk, heads),
                         strides(q_t, q_h, group, 0));
  Tensor k = make_tensor(static_cast<const Element*>(params.k), make_shape(params.tokens_kv, params.d_qk, heads),
                         kv_strides(k_t, k_h, 0));
  // mainloop.cuh: column, token of a sequence that ends at `tokens_kv`, and where in truth it ends.
  Tensor v = make_tensor(
      static_cast<const Element*>(params.v) - params.tokens_kv * v_t,
      make_shape(kPrefillHeadDimV, params.tokens_kv, make_shape(make_shape(group, h_kv), 2 * params.tokens_kv)),
      select<1, 0, 2>(kv_strides(v_t, v_h, v_t)));
  const auto cluster =
      tiled_divide(make_layout(typename Main::ClusterShape{}), make_tile(typename Main::MmaQK::TiledMma::AtomThrID{}));
  using MmaQK = typename Main::MmaQK;
  using MmaPV = typename Main::MmaPV;

  // What is known of lengths here is that none is above the number of tokens.
  const auto* ends = params.planned;
  const typename F::Length lengths_q{params.tokens_q, const_cast<int*>(&ends->q_begin), params.tokens_q};
  const typename F::Length lengths_k{params.tokens_kv, const_cast<int*>(&ends->k_begin), params.tokens_kv};
  typename F::HeadDims head_dims;
  if constexpr (F::kMla) {
    head_dims = {kPrefillHeadDimV, params.d_qk - kPrefillHeadDimV};
  } else {
    head_dims = params.d_qk;
  }
  const typename F::Problem problem{lengths_q, lengths_k, head_dims, heads, params.causal};
  const int64_t out_h = kPrefillHeadDimV, lse_h = params.tokens_q;
  return {problem,
          {{make_tma_atom_A_sm100<Element>(typename MmaQK::GmemTiledCopyA{}, q,
                                           typename MmaQK::SmemLayoutA{}(_, _, _, _0{}), typename MmaQK::TileShape{},
                                           typename MmaQK::TiledMma{}, cluster),
            make_tma_atom_B_sm100<Element>(typename MmaQK::GmemTiledCopyB{}, k,
                                           typename MmaQK::SmemLayoutB{}(_, _, _, _0{}), typename MmaQK::TileShape{},
                                           typename MmaQK::TiledMma{}, cluster),
            make_tma_atom_B_sm100<Element>(typename MmaPV::GmemTiledCopyB{}, v,
                                           typename MmaPV::SmemLayoutB{}(_, _, _, _0{}), typename MmaPV::TileShape{},
                                           typename MmaPV::TiledMma{}, cluster)},
           params.softmax_scale,
           params.scale_log2,
           1.0f},
          F::Epilogue::to_underlying_arguments(
              problem, {static_cast<Element*>(params.out), strides(params.h_q * out_h, out_h, group, 0), params.lse,
                        StrideLse{{}, {{lse_h, lse_h * group}, 0}}}),
          {params.plan, params.planned, params.h_q, params.causal}};
}

template <class T, int kHeadDim>
void launch(const DensePrefillParams& params, void* stream) {
  using F = Fmha<T, kHeadDim>;
  using Kernel = typename F::Kernel;
  constexpr auto kKernel = cutlass::device_kernel<Kernel>;
  constexpr int kThreads = Kernel::MaxThreadsPerBlock, kSharedBytes = Kernel::SharedStorageSize;
  allow_shared_memory<kKernel, kSharedBytes>("sm100_dense_prefill");
  if (params.tokens_kv > 0) {
    // At least as many as the plan has items; the host does not see the lengths.
    const int64_t row_tiles = params.tokens_q / params.row_tile + params.num_sequences + 1;
    const auto grid = static_cast<unsigned>(row_tiles * params.h_q);
    kKernel<<<grid, kThreads, kSharedBytes, static_cast<cudaStream_t>(stream)>>>(kernel_params<F>(params));
    const cudaError_t status = cudaGetLastError();
    check(status == cudaSuccess, ErrorKind::kCuda, "sm100_dense_prefill: ", cudaGetErrorString(status), " (grid ", grid,
          ", ", kThreads, " threads, ", kSharedBytes, " bytes of shared memory)");
  }
  launch_keyless_rows(params, stream);
}

}  // namespace flash_mla::sm100::dense_prefill
