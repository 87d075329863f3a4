// Attention over a union of disjoint key sets from the results over each of them. One warp a row.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kWarps = 4;

template <class T>
__device__ float to_float(T x) {
  return static_cast<float>(x);
}

template <class T>
__device__ T from_float(float x) {
  return static_cast<T>(x);
}

template <class T>
__global__ void __launch_bounds__(32 * kWarps) merge_kernel(const __grid_constant__ MergeParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  __shared__ float all_weights[kWarps][kMaxMergeParts];
  const int lane = threadIdx.x % 32;
  float* weights = all_weights[threadIdx.x / 32];
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < params.num_rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t head = row % params.heads, token = row / params.heads % params.tokens,
                  batch = row / params.heads / params.tokens;
    auto lse_of = [&](int part) {
      const auto& stride = params.stride_lse[part];
      return params.lses[part][batch * stride[0] + token * stride[1] + head * stride[2]];
    };
    // A part without a key has lse +inf and stays out.
    const float own = lane < params.num_parts ? lse_of(lane) : INFINITY;
    float largest = own == INFINITY ? -INFINITY : own;
    for (int step = 16; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
    }
    const float weight = own == INFINITY || own == -INFINITY ? 0.0f : expf(own - largest);
    float total = weight;
    for (int step = 16; step > 0; step /= 2) {
      total += __shfl_xor_sync(~0u, total, step);
    }
    __syncwarp();
    if (lane < kMaxMergeParts) {
      weights[lane] = weight;
    }
    __syncwarp();
    T* out = static_cast<T*>(params.out) + row * params.d;
    for (int column = lane; column < params.d; column += 32) {
      float sum = 0;
      for (int part = 0; part < params.num_parts; ++part) {
        const auto& stride = params.stride_out[part];
        if (weights[part] > 0) {
          sum += weights[part] *
                 to_float(static_cast<const T*>(
                     params.outs[part])[batch * stride[0] + token * stride[1] + head * stride[2] + column]);
        }
      }
      out[column] = from_float<T>(total > 0 ? sum / total : 0.0f);
    }
    if (lane == 0) {
      const auto& stride = params.stride_merged_lse;
      params.lse[batch * stride[0] + token * stride[1] + head * stride[2]] =
          total > 0 ? largest + logf(total) : INFINITY;
    }
  }
}

}  // namespace

void launch_merge(const MergeParams& params, void* stream) {
  if (params.num_rows == 0) {
    return;
  }
  const auto kernel = params.element == 0   ? merge_kernel<__nv_bfloat16>
                      : params.element == 1 ? merge_kernel<__half>
                                            : merge_kernel<float>;
  const int64_t ctas = ceil_div(params.num_rows, static_cast<int64_t>(kWarps));
  device::launch_dependent("merge_attention_states", kernel, static_cast<unsigned>(ctas < 4096 ? ctas : 4096),
                           32 * kWarps, 0, stream, params);
}

}  // namespace flash_mla
