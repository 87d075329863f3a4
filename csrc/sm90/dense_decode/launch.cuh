#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <array>

#include "core/error.h"
#include "device/launch.h"
#include "sm90/dense_decode/kernel.cuh"

namespace flash_mla::sm90::dense_decode {

// What a tensor map is made from. Maps are kept per thread, since a cache seldom changes.
struct CacheFacts {
  const void* data;
  int64_t stride_page, stride_row, stride_head;
  int page, num_pages, h_kv, box_rows;
  bool operator==(const CacheFacts&) const = default;
};

// The cache as TMA sees it: 64-column slices, the width of the swizzle, as a dimension of their own.
template <class C>
CUtensorMap make_cache_map(const CacheFacts& cache, int slices) {
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
  const cuuint64_t sizes[5] = {64, static_cast<cuuint64_t>(cache.page), C::kSlices, static_cast<cuuint64_t>(cache.h_kv),
                               static_cast<cuuint64_t>(cache.num_pages)};
  // A dimension of size 1 may have any stride in torch; TMA wants multiples of 16 bytes all the same.
  auto stride_bytes = [](int64_t stride, int size) { return static_cast<cuuint64_t>(size > 1 ? stride : 64) * kBytes; };
  const cuuint64_t strides[4] = {cache.stride_row * kBytes, 64 * kBytes, stride_bytes(cache.stride_head, cache.h_kv),
                                 stride_bytes(cache.stride_page, cache.num_pages)};
  const cuuint32_t box[5] = {64, static_cast<cuuint32_t>(cache.box_rows), static_cast<cuuint32_t>(slices), 1, 1};
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  constexpr auto kType =
      std::is_same_v<typename C::Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  CUtensorMap map;
  const CUresult status =
      encode(&map, kType, 5, const_cast<void*>(cache.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  check(status == CUDA_SUCCESS, ErrorKind::kCuda, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
        " for k_cache of ", cache.num_pages, " pages of ", cache.page, " rows, strides ", cache.stride_page, ", ",
        cache.stride_row, ", ", cache.stride_head);
  return map;
}

template <class C>
const CacheMaps& cache_maps(const DenseDecodeParams& params) {
  constexpr int kKept = 128;  // an engine has one cache per layer
  struct Kept {
    CacheFacts facts{};
    CacheMaps maps{};
  };
  thread_local std::array<Kept, kKept> kept;
  const CacheFacts facts{params.k_cache, params.stride_k_page, params.stride_k_row, params.stride_k_h,
                         params.page,    params.num_pages,     params.h_kv,         params.box_rows};
  const auto address = reinterpret_cast<uintptr_t>(facts.data);
  Kept& place = kept[(address >> 8 ^ address >> 16 ^ address >> 24) % kKept];
  if (!(place.facts == facts)) {
    place.maps = {make_cache_map<C>(facts, 2), make_cache_map<C>(facts, 1)};
    place.facts = facts;
  }
  return place.maps;
}

template <class T, int kHeadDim>
void launch(const DenseDecodeParams& params, void* stream) {
  using C = Config<T, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = dense_decode_kernel<T, kHeadDim>;
  allow_shared_memory<kKernel, sizeof(Storage<C>)>("sm90_dense_decode");
  const CacheMaps maps = params.box_rows > 0 ? cache_maps<C>(params) : CacheMaps{};
  const int64_t ctas = static_cast<int64_t>(params.num_parts) * params.h_kv * params.num_row_tiles;
  check(ctas <= INT32_MAX, ErrorKind::kUnsupported, "sm90_dense_decode: ", ctas, " CTAs are more than a grid has");
  device::launch_dependent("sm90_dense_decode", kKernel, static_cast<unsigned>(ctas), C::kThreads, sizeof(Storage<C>),
                           stream, params, maps);
}

}  // namespace flash_mla::sm90::dense_decode
