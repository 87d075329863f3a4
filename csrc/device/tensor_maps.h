// Tensor maps of TMA: how it sees the tensors of dense prefill.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "core/error.h"

namespace flash_mla::inline device {

struct TensorMapShape {
  CUtensorMapDataType type;
  const void* data;
  cuuint64_t sizes[5];
  cuuint64_t strides[4];  // bytes, from the second dimension on
  cuuint32_t box[5];
  CUtensorMapSwizzle swizzle;
  cuuint32_t rank = 5;
};

// Zero, or the driver's error.
inline CUresult encode(const TensorMapShape& shape, CUtensorMap& map) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  static const Encode function = [] {
    void* symbol = nullptr;
    cudaDriverEntryPointQueryResult found{};
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &symbol, 12000, cudaEnableDefault, &found);
    check(status == cudaSuccess && found == cudaDriverEntryPointSuccess, ErrorKind::kCuda,
          "the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<Encode>(symbol);
  }();
  const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
  return function(&map, shape.type, shape.rank, const_cast<void*>(shape.data), shape.sizes, shape.strides, shape.box,
                  steps, CU_TENSOR_MAP_INTERLEAVE_NONE, shape.swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                  CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

template <class T>
constexpr CUtensorMapDataType kTensorMapType = std::is_same_v<T, float>    ? CU_TENSOR_MAP_DATA_TYPE_FLOAT32
                                               : std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                                           : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// A tensor [tokens, heads, slices of 128 bytes]: the width of the swizzle is a dimension of its own.
struct Rows {
  const char* name;
  const void* data;
  int tokens, heads, slices;
  int64_t stride_token, stride_head;  // elements
  int box_rows, box_slices;
};

// Coordinates: column, token, slice, head, 0. With `ending` rows end where a sequence does, whichever it is:
// coordinates are then column, tokens - n, slice, head, end for the last n rows before the token `end`, and what lies
// behind them is out of range: zeros to a load, and left alone by a reduction.
template <class T>
CUtensorMap rows_map(const Rows& rows, bool ending = false) {
  constexpr cuuint64_t kColumns = 128 / sizeof(T);
  // A dimension of size 1 may have any stride in torch; TMA wants multiples of 16 bytes all the same.
  auto stride_bytes = [](int64_t stride, int size) {
    return size > 1 ? static_cast<cuuint64_t>(stride) * sizeof(T) : cuuint64_t{128};
  };
  const cuuint64_t tokens = static_cast<cuuint64_t>(rows.tokens),
                   stride_token = stride_bytes(rows.stride_token, rows.tokens);
  const TensorMapShape shape{
      kTensorMapType<T>,
      static_cast<const char*>(rows.data) - (ending ? tokens * stride_token : 0),
      {kColumns, tokens, static_cast<cuuint64_t>(rows.slices), static_cast<cuuint64_t>(rows.heads),
       ending ? tokens + 1 : 1},
      {stride_token, 128, stride_bytes(rows.stride_head, rows.heads), ending ? stride_token : 128},
      {kColumns, static_cast<cuuint32_t>(rows.box_rows), static_cast<cuuint32_t>(rows.box_slices), 1, 1},
      CU_TENSOR_MAP_SWIZZLE_128B};
  CUtensorMap map;
  const CUresult status = encode(shape, map);
  check(status == CUDA_SUCCESS, ErrorKind::kCuda, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
        " for ", rows.name, " of ", rows.tokens, " tokens and ", rows.heads, " heads, strides ", rows.stride_token,
        ", ", rows.stride_head);
  return map;
}

}  // namespace flash_mla::inline device
