#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "core/error.h"
#include "device/launch.h"
#include "sm90/dense_decode/kernel.cuh"

namespace flash_mla::sm90::dense_decode {

// The cache as TMA sees it: 64-column slices, the width of the swizzle, as a dimension of their own.
template <class C>
CUtensorMap make_cache_map(const DenseDecodeParams& params) {
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
  constexpr uint64_t kBytes = sizeof(typename C::Element);
  const cuuint64_t sizes[5] = {64, static_cast<cuuint64_t>(params.page), C::kSlices,
                               static_cast<cuuint64_t>(params.h_kv), static_cast<cuuint64_t>(params.num_pages)};
  // A dimension of size 1 may have any stride in torch; TMA wants multiples of 16 bytes all the same.
  auto stride_bytes = [](int64_t stride, int size) { return static_cast<cuuint64_t>(size > 1 ? stride : 64) * kBytes; };
  const cuuint64_t strides[4] = {params.stride_k_row * kBytes, 64 * kBytes,
                                 stride_bytes(params.stride_k_h, params.h_kv),
                                 stride_bytes(params.stride_k_page, params.num_pages)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(params.box_rows), 1, 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  constexpr auto kType =
      std::is_same_v<typename C::Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult status = encode(&map, kType, 5, const_cast<void*>(params.k_cache), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorKind::kCuda, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
        " for k_cache of ", params.num_pages, " pages of ", params.page, " rows, strides ", params.stride_k_page, ", ",
        params.stride_k_row, ", ", params.stride_k_h);
  return map;
}

template <class T, int kHeadDim>
void launch(const DenseDecodeParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_decode_kernel<T, kHeadDim>;
  static const cudaError_t attribute_status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Storage<C>));
  check(attribute_status == cudaSuccess, ErrorKind::kCuda, "sm90_dense_decode: ", cudaGetErrorString(attribute_status));
  const CUtensorMap map = params.box_rows > 0 ? make_cache_map<C>(params) : CUtensorMap{};
  const int64_t ctas = static_cast<int64_t>(params.num_parts) * params.h_kv * params.num_row_tiles;
  check(ctas <= INT32_MAX, ErrorKind::kUnsupported, "sm90_dense_decode: ", ctas, " CTAs are more than a grid has");
  device::launch_dependent("sm90_dense_decode", kKernel, static_cast<unsigned>(ctas), C::kThreads, sizeof(Storage<C>),
                           stream, params, map);
}

}  // namespace flash_mla::sm90::dense_decode
