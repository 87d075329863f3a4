#pragma once

#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "device/tensor_maps.h"
#include "sm100/dense_prefill_backward/kernel.cuh"

namespace flash_mla::sm100::dense_prefill_backward {

template <class T, int kHeadDim>
TensorMaps make_maps(const DensePrefillBackwardParams& params) {
  using C = Config<T, kHeadDim>;
  const DensePrefillParams& forward = params.forward;
  const CUtensorMap k = rows_map<T>({"k", forward.k, forward.tokens_kv, forward.h_kv, C::kSlices, forward.stride_k_t,
                                     forward.stride_k_h, kBackwardKeyTile, C::kSlices},
                                    true);
  const CUtensorMap v = rows_map<T>({"v", forward.v, forward.tokens_kv, forward.h_kv, C::kValueSlices,
                                     forward.stride_v_t, forward.stride_v_h, kBackwardKeyTile, C::kValueSlices},
                                    true);
  if (forward.tokens_q == 0) {  // nothing is loaded, but a map has to be of something
    return {k, k, v, k, k};
  }
  return {rows_map<T>({"q", forward.q, forward.tokens_q, forward.h_q, C::kSlices, forward.stride_q_t,
                       forward.stride_q_h, kBackwardQueryTile, C::kSlices},
                      true),
          k, v,
          rows_map<T>({"d_out", params.d_out, forward.tokens_q, forward.h_q, C::kValueSlices, params.stride_do_t,
                       params.stride_do_h, kBackwardQueryTile, C::kValueSlices},
                      true),
          rows_map<float>({"dq", params.dq_sum, forward.tokens_q, forward.h_q, C::kSumSlices, kHeadDim,
                           static_cast<int64_t>(forward.tokens_q) * kHeadDim, kBackwardQueryTile, 1},
                          true)};
}

template <class T, int kHeadDim>
void launch(const DensePrefillBackwardParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_prefill_backward_kernel<T, kHeadDim>;
  allow_shared_memory<kKernel, sizeof(Storage<C>)>("sm100_dense_prefill_backward");
  // At least as many CTAs as the plan has items; the host does not see the lengths.
  const DensePrefillParams& forward = params.forward;
  const int64_t key_tiles = forward.tokens_kv / kBackwardKeyTile + forward.num_sequences + 1;
  device::launch_dependent("sm100_dense_prefill_backward", kKernel, static_cast<unsigned>(key_tiles * forward.h_kv),
                           C::kThreads, sizeof(Storage<C>), stream, params, make_maps<T, kHeadDim>(params));
}

}  // namespace flash_mla::sm100::dense_prefill_backward
