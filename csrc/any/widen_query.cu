// Queries of e4m3 values as bfloat16, which has all of them, for kernels that multiply bfloat16.
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/dequantize.cuh"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kThreads = 256;
constexpr int kValues = 16;  // of a thread

__global__ void __launch_bounds__(kThreads) widen_query_kernel(const __grid_constant__ WidenQueryParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int row_units = params.d_qk / kValues;
  const int64_t units = params.num_rows * row_units, step = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t at = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; at < units; at += step) {
    const int64_t row = at / row_units, unit = at - row * row_units, token = row / params.h_q;
    const int64_t offset = token / params.s_q * params.stride_b + token % params.s_q * params.stride_s +
                           row % params.h_q * params.stride_h + unit * kValues;
    const uint4 raw = *reinterpret_cast<const uint4*>(static_cast<const unsigned char*>(params.q) + offset);
    auto* wide = reinterpret_cast<uint4*>(static_cast<unsigned char*>(params.wide) + at * kValues * 2);
    const uint2 a = scale_e4m3x4(raw.x, 1), b = scale_e4m3x4(raw.y, 1), c = scale_e4m3x4(raw.z, 1),
                d = scale_e4m3x4(raw.w, 1);
    wide[0] = make_uint4(a.x, a.y, b.x, b.y);
    wide[1] = make_uint4(c.x, c.y, d.x, d.y);
  }
}

}  // namespace

void launch_widen_query(const WidenQueryParams& params, void* stream) {
  const int64_t ctas = ceil_div<int64_t>(params.num_rows * (params.d_qk / kValues), kThreads);
  const int64_t full = int64_t{8} * params.num_sms;
  device::launch_dependent("widen_query", widen_query_kernel, static_cast<unsigned>(ctas < full ? ctas : full),
                           kThreads, 0, stream, params);
}

}  // namespace flash_mla
