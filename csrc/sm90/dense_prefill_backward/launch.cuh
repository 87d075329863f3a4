#pragma once

#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "device/tensor_maps.h"
#include "sm90/dense_prefill_backward/kernel.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

template <class T, int kHeadDim>
TensorMaps make_maps(const DensePrefillBackwardParams& params) {
  using C = Config<T, kHeadDim>;
  const DensePrefillParams& forward = params.forward;
  const Rows k{"k",      forward.k, forward.tokens_kv, forward.h_kv, C::kSlices, forward.stride_k_t, forward.stride_k_h,
               C::kKeys, 1};
  const CUtensorMap k_map = rows_map<T>(k);
  const CUtensorMap v_map = rows_map<T>({"v", forward.v, forward.tokens_kv, forward.h_kv, C::kValueSlices,
                                         forward.stride_v_t, forward.stride_v_h, C::kKeys, C::kValueSlices});
  if (forward.tokens_q == 0) {  // nothing else is loaded, but a map has to be of something
    return {k_map, k_map, v_map, k_map, k_map};
  }
  const int64_t dq_row = kHeadDim;
  return {
      rows_map<T>({"q", forward.q, forward.tokens_q, forward.h_q, C::kSlices, forward.stride_q_t, forward.stride_q_h,
                   C::kQueries, C::kSlices}),
      k_map,
      v_map,
      rows_map<T>({"d_out", params.d_out, forward.tokens_q, forward.h_q, C::kValueSlices, params.stride_do_t,
                   params.stride_do_h, C::kQueries, C::kValueSlices}),
      rows_map<float>({"dq", params.dq_sum, forward.tokens_q, forward.h_q, kHeadDim / 32, dq_row,
                       forward.tokens_q * dq_row, C::kQueries, C::kDqSlices}),
  };
}

template <class T, int kHeadDim>
void launch(const DensePrefillBackwardParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_prefill_backward_kernel<T, kHeadDim>;
  allow_shared_memory<kKernel, sizeof(Storage<C>)>("sm90_dense_prefill_backward");
  device::launch_dependent("sm90_dense_prefill_backward", kKernel, static_cast<unsigned>(params.forward.num_sms),
                           C::kThreads, sizeof(Storage<C>), stream, params, make_maps<T, kHeadDim>(params));
}

}  // namespace flash_mla::sm90::dense_prefill_backward
