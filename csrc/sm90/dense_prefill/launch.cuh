#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "sm90/dense_prefill/kernel.cuh"

namespace flash_mla::sm90::dense_prefill {

// A tensor [tokens, heads, slices of 64 columns] as TMA sees it: the width of the swizzle is a dimension of its own.
struct Rows {
  const char* name;
  const void* data;
  int tokens, heads, slices;
  int64_t stride_token, stride_head;
  int box_rows;
};

template <class T>
CUtensorMap make_map(const Rows& rows) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    check(status == cudaSuccess && found == cudaDriverEntryPointSuccess, ErrorKind::kCuda,
          "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(function);
  }();
  constexpr uint64_t kBytes = sizeof(T);
  const cuuint64_t sizes[5] = {64, static_cast<cuuint64_t>(rows.tokens), static_cast<cuuint64_t>(rows.slices),
                               static_cast<cuuint64_t>(rows.heads), 1};
  // A dimension of size 1 may have any stride in torch; TMA wants multiples of 16 bytes all the same.
  auto stride_bytes = [](int64_t stride, int size) { return static_cast<cuuint64_t>(size > 1 ? stride : 64) * kBytes; };
  const cuuint64_t strides[4] = {stride_bytes(rows.stride_token, rows.tokens), 64 * kBytes,
                                 stride_bytes(rows.stride_head, rows.heads), 64 * kBytes};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(rows.box_rows), static_cast<cuuint32_t>(rows.slices), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  constexpr auto kType = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult status =
      encode(&map, kType, 5, const_cast<void*>(rows.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorKind::kCuda, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
        " for ", rows.name, " of ", rows.tokens, " tokens and ", rows.heads, " heads, strides ", rows.stride_token,
        ", ", rows.stride_head);
  return map;
}

template <class T, int kHeadDim>
void launch(const DensePrefillParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_prefill_kernel<T, kHeadDim>;
  static const cudaError_t attribute_status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Storage<C>));
  check(attribute_status == cudaSuccess, ErrorKind::kCuda,
        "sm90_dense_prefill: ", cudaGetErrorString(attribute_status));
  // Where there is no key, nothing is loaded, but a map has to be of something.
  const bool any_key = params.tokens_kv > 0;
  const TensorMaps maps{
      make_map<T>({"q", params.q, params.tokens_q, params.h_q, C::kSlices, params.stride_q_t, params.stride_q_h,
                   C::kWarpgroupRows}),
      make_map<T>({"k", any_key ? params.k : params.q, any_key ? params.tokens_kv : 1, params.h_kv, C::kSlices,
                   params.stride_k_t, params.stride_k_h, C::kKeys}),
      make_map<T>({"v", any_key ? params.v : params.q, any_key ? params.tokens_kv : 1, params.h_kv, C::kValueSlices,
                   params.stride_v_t, params.stride_v_h, C::kKeys}),
  };
  device::launch_dependent("sm90_dense_prefill", kKernel, static_cast<unsigned>(params.num_sms), C::kThreads,
                           sizeof(Storage<C>), stream, params, maps);
}

}  // namespace flash_mla::sm90::dense_prefill
