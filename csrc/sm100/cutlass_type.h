// CUTLASS's name of an element type.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <type_traits>

namespace flash_mla::sm100 {

template <class T>
using CutlassType = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, cutlass::bfloat16_t, cutlass::half_t>;

}  // namespace flash_mla::sm100
