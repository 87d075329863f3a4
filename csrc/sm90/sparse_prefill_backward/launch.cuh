#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "device/launch.h"
#include "device/tensor_maps.h"
#include "sm90/sparse_prefill_backward/kernel.cuh"

namespace flash_mla::sm90::sparse_prefill_backward {

// Rows are the heads of a token.
template <class C>
CUtensorMap heads_map(const SparsePrefillBackwardParams& params, const char* name, const void* data, int slices,
                      int64_t stride_s, int64_t stride_h) {
  return rows_map<__nv_bfloat16>({name, data, params.h_q, params.s_q, slices, stride_h, stride_s, C::kHeads, slices});
}

template <int kHeadDim, bool kFixed>
void launch(const SparsePrefillBackwardParams& params, void* stream) {
  using C = Config<kHeadDim, kFixed>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = sparse_prefill_backward_kernel<kHeadDim, kFixed>;
  allow_shared_memory<kKernel, sizeof(Storage<C>)>("sm90_sparse_prefill_backward");
  const TensorMaps maps{
      heads_map<C>(params, "q", params.q, C::kSlices, params.stride_q_s, params.stride_q_h),
      heads_map<C>(params, "d_out", params.d_out, C::kValueSlices, params.stride_do_s, params.stride_do_h)};
  const int64_t items = static_cast<int64_t>(params.s_q) * params.head_blocks;
  check(items <= INT32_MAX - params.num_sms, ErrorKind::kUnsupported, "sm90_sparse_prefill_backward: ", items,
        " blocks of 64 heads are too many");
  device::launch_dependent("sm90_sparse_prefill_backward", kKernel,
                           static_cast<unsigned>(std::min<int64_t>(items, params.num_sms)), C::kThreads,
                           sizeof(Storage<C>), stream, params, maps);
}

template <int kHeadDim>
void launch(const SparsePrefillBackwardParams& params, void* stream) {
  params.sums != nullptr ? launch<kHeadDim, false>(params, stream) : launch<kHeadDim, true>(params, stream);
}

}  // namespace flash_mla::sm90::sparse_prefill_backward
