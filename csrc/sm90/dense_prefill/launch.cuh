#pragma once

#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "device/tensor_maps.h"
#include "sm90/dense_prefill/kernel.cuh"

namespace flash_mla::sm90::dense_prefill {

template <class T, int kHeadDim>
void launch(const DensePrefillParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_prefill_kernel<T, kHeadDim>;
  allow_shared_memory<kKernel, sizeof(Storage<C>)>("sm90_dense_prefill");
  // Where there is no key, nothing is loaded, but a map has to be of something.
  const bool any_key = params.tokens_kv > 0;
  const TensorMaps maps{
      rows_map<T>({"q", params.q, params.tokens_q, params.h_q, C::kSlices, params.stride_q_t, params.stride_q_h,
                   C::kWarpgroupRows, C::kSlices}),
      rows_map<T>({"k", any_key ? params.k : params.q, any_key ? params.tokens_kv : 1, params.h_kv, C::kSlices,
                   params.stride_k_t, params.stride_k_h, C::kKeys, C::kSlices}),
      rows_map<T>({"v", any_key ? params.v : params.q, any_key ? params.tokens_kv : 1, params.h_kv, C::kValueSlices,
                   params.stride_v_t, params.stride_v_h, C::kKeys, C::kValueSlices}),
  };
  device::launch_dependent("sm90_dense_prefill", kKernel, static_cast<unsigned>(params.num_sms), C::kThreads,
                           sizeof(Storage<C>), stream, params, maps);
}

}  // namespace flash_mla::sm90::dense_prefill
