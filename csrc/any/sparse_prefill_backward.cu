// Around the backward of sparse prefill: what it starts from, and the gradients of the rows and of the sink from their
// sums.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kThreads = 256;
constexpr int kCtasPerSm = 8;
constexpr int kHeadsTogether = 64;  // whose terms the kernel adds up before it scatters them

__device__ int64_t thread_of_grid() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }
__device__ int64_t warp_of_grid() { return thread_of_grid() / 32; }
__device__ int64_t warps_of_grid() { return threads_of_grid() / 32; }

__device__ void begin_kernel() {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

__device__ float warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value += __shfl_xor_sync(~0u, value, step);
  }
  return value;
}

// 0 where there is none: what is no finite number is told of when it is scattered.
__device__ float finite_magnitude(float value) { return fabsf(value) < INFINITY ? fabsf(value) : 0; }

// To the bits of a number that is not negative.
__device__ void raise(uint32_t* largest, float value) {
  const uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(value));
  if (threadIdx.x % 32 == 0 && bits > *largest) {
    atomicMax(largest, bits);
  }
}

// ---- Rows.

// Eight columns of bfloat16.
__device__ void unpack8(const void* from, float (&values)[8]) {
  const uint4 words = *static_cast<const uint4*>(from);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack2<__nv_bfloat16>(pairs[i]);
    values[2 * i] = pair.x, values[2 * i + 1] = pair.y;
  }
}

// A warp takes a head of a token.
__device__ void prepare_row(const SparsePrefillBackwardParams& params, int64_t token, int64_t head, int lane) {
  const auto* d_out =
      static_cast<const __nv_bfloat16*>(params.d_out) + token * params.stride_do_s + head * params.stride_do_h;
  const auto* out =
      static_cast<const __nv_bfloat16*>(params.out) + token * params.stride_out_s + head * params.stride_out_h;
  float delta = 0, largest = 0;
#pragma unroll
  for (int i = 0; i < kHeadDimV / 256; ++i) {
    float left[8], right[8];
    unpack8(d_out + 256 * i + 8 * lane, left);
    unpack8(out + 256 * i + 8 * lane, right);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      delta = fmaf(left[j], right[j], delta);
      largest = fmaxf(largest, finite_magnitude(left[j]));
    }
  }
  delta = warp_sum(delta);
  const float lse =
      params.lse[token * params.stride_lse_s + head * params.stride_lse_h] * (params.lse_base2 ? 1.0f : kLog2E);
  const bool has_key = lse != INFINITY;
  const float excess = params.attn_sink == nullptr ? -INFINITY : params.attn_sink[head] * kLog2E - lse,
              share = 1 / (1 + exp2f(excess));
  const float d_lse =
      params.d_lse[token * params.stride_dlse_s + head * params.stride_dlse_h] * (params.lse_base2 ? kLog2E : 1.0f);
  const BackwardRow row =
      has_key ? BackwardRow{lse, share, d_lse - share * delta, (share - 1) * delta} : BackwardRow{INFINITY, 0, 0, 0};
  if (lane == 0) {
    *reinterpret_cast<float4*>(params.rows + token * params.h_q + head) =
        make_float4(row.log_sum, row.share, row.offset, row.sink_term);
  }
  if (params.sums == nullptr) {
    raise(&params.fixed.bounds->d_out, has_key ? largest : 0);
    raise(&params.fixed.bounds->offset, finite_magnitude(row.offset));
    const auto* q = static_cast<const __nv_bfloat16*>(params.q) + token * params.stride_q_s + head * params.stride_q_h;
    largest = 0;
    for (int column = 8 * lane; column < params.d_qk; column += 256) {
      float values[8];
      unpack8(q + column, values);
#pragma unroll
      for (const float value : values) {
        largest = fmaxf(largest, finite_magnitude(value));
      }
    }
    raise(&params.fixed.bounds->q, largest);
  }
}

// Of a list that may be shorter than topk.
__device__ int length_of(const KeySource& keys, int64_t token) {
  return keys.lengths == nullptr ? keys.topk : min(max(keys.lengths[token * keys.stride_lengths_s], 0), keys.topk);
}

__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ SparsePrefillBackwardParams params) {
  begin_kernel();
  for (int token = blockIdx.x; token < params.s_q; token += gridDim.x) {
    for (int head = threadIdx.x / 32; head < params.h_q; head += kThreads / 32) {
      prepare_row(params, token, head, threadIdx.x % 32);
    }
  }
  if (params.sums != nullptr) {
    return;
  }
  const KeySource& keys = params.keys;
  for (int64_t token = warp_of_grid(); token < params.s_q; token += warps_of_grid()) {
    const int length = length_of(keys, token);
    for (int i = threadIdx.x % 32; i < length; i += 32) {
      const auto index = static_cast<uint32_t>(keys.indices[token * keys.stride_indices_s + i]);
      if (index < keys.num_slots) {
        atomicAdd(params.fixed.counts + index, 1);
      }
    }
  }
}

// ---- Units of sums in fixed point.

// A power of two, such that as many terms as the row gets stay below kMostUnits together.
__global__ void __launch_bounds__(kThreads) units_kernel(const __grid_constant__ SparsePrefillBackwardParams params) {
  begin_kernel();
  const KeySource& keys = params.keys;
  const int lane = threadIdx.x % 32;
  const float q = __uint_as_float(params.fixed.bounds->q), d_out = __uint_as_float(params.fixed.bounds->d_out),
              offset = __uint_as_float(params.fixed.bounds->offset);
  for (int64_t slot = warp_of_grid(); slot < keys.num_slots; slot += warps_of_grid()) {
    const int count = params.fixed.counts[slot];
    if (count == 0) {
      continue;
    }
    const int64_t page = slot / keys.page;
    const auto* row =
        reinterpret_cast<const __nv_bfloat16*>(static_cast<const unsigned char*>(keys.cache) + page * keys.stride_page +
                                               (slot - page * keys.page) * keys.stride_row);
    float square = 0;
#pragma unroll
    for (int i = 0; i < kHeadDimV / 256; ++i) {
      float values[8];
      unpack8(row + 256 * i + 8 * lane, values);
#pragma unroll
      for (const float value : values) {
        square = fmaf(value, value, square);
      }
    }
    square = warp_sum(square);
    if (lane == 0) {
      // |d_out . v| is at most the norm of d_out, which is below 23 times its largest element, times that of v. The
      // factor of 2 is for roundings.
      const float slope = fabsf(params.softmax_scale) * (23 * d_out * sqrtf(square) + offset),
                  most = 2.0f * kHeadsTogether * ceil_div(params.h_q, kHeadsTogether) * (slope * q + d_out) * count;
      const int exponent = most < INFINITY ? min(max(61 - ilogbf(fmaxf(most, 0x1p-60f)), -126), 120) : -126;
      params.fixed.units_per_one[slot] = ldexpf(1.0f, exponent);
    }
  }
}

// ---- Gradients.

__device__ float4 load4(const float* sums) { return *reinterpret_cast<const float4*>(sums); }

__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ SparsePrefillBackwardParams params) {
  begin_kernel();
  const int row_units = params.d_qk / 8;
  const int64_t units = static_cast<int64_t>(params.keys.num_slots) * row_units;
  for (int64_t unit = thread_of_grid(); unit < units; unit += threads_of_grid()) {
    float values[8];
    if (params.sums != nullptr) {
      const float4 low = load4(params.sums + 8 * unit), high = load4(params.sums + 8 * unit + 4);
      values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
      values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
    } else {
      const int64_t slot = unit / row_units;
      const double one = params.fixed.counts[slot] > 0 ? 1.0 / params.fixed.units_per_one[slot] : 0;
      for (int i = 0; i < 8; ++i) {
        const double sum = static_cast<double>(params.fixed.sums[8 * unit + i]) * one;
        values[i] = params.fixed.overflows[slot] != 0 ? NAN : static_cast<float>(sum);
      }
    }
    static_cast<uint4*>(params.dkv)[unit] =
        make_uint4(pack2<__nv_bfloat16>(values[0], values[1]), pack2<__nv_bfloat16>(values[2], values[3]),
                   pack2<__nv_bfloat16>(values[4], values[5]), pack2<__nv_bfloat16>(values[6], values[7]));
  }
}

// A CTA takes a head; the order of the sum is fixed.
__global__ void __launch_bounds__(kThreads) sink_kernel(const __grid_constant__ SparsePrefillBackwardParams params) {
  __shared__ float sums[kThreads / 32];
  begin_kernel();
  float sum = 0;
  for (int token = threadIdx.x; token < params.s_q; token += kThreads) {
    sum += params.rows[static_cast<int64_t>(token) * params.h_q + blockIdx.x].sink_term;
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) {
    sums[threadIdx.x / 32] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kThreads / 32; ++warp) {
      sum += sums[warp];
    }
    params.d_sink[blockIdx.x] = sum;
  }
}

void clear(void* data, int64_t bytes, void* stream) {
  const cudaError_t status = cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
  check(status == cudaSuccess, ErrorKind::kCuda, "sparse_prefill_backward: ", cudaGetErrorString(status));
}

unsigned grid_of(const SparsePrefillBackwardParams& params) {
  return static_cast<unsigned>(params.num_sms) * kCtasPerSm;
}

}  // namespace

void launch_sparse_backward_prepare(const SparsePrefillBackwardParams& params, void* stream) {
  const int64_t slots = params.keys.num_slots, sums = slots * params.d_qk;
  if (params.sums != nullptr) {
    clear(params.sums, sums * sizeof(float), stream);
  } else {
    clear(params.fixed.sums, sums * sizeof(int64_t), stream);
    clear(params.fixed.counts, slots * sizeof(int32_t), stream);
    clear(params.fixed.overflows, slots * sizeof(int32_t), stream);
    clear(params.fixed.bounds, sizeof(BackwardBounds), stream);
  }
  device::launch_dependent("sparse_backward_prepare", prepare_kernel, grid_of(params), kThreads, 0, stream, params);
  if (params.sums == nullptr) {
    device::launch_dependent("sparse_backward_units", units_kernel, grid_of(params), kThreads, 0, stream, params);
  }
}

void launch_sparse_backward_finish(const SparsePrefillBackwardParams& params, void* stream) {
  device::launch_dependent("sparse_backward_finish", finish_kernel, grid_of(params), kThreads, 0, stream, params);
  if (params.d_sink != nullptr) {
    device::launch_dependent("sparse_backward_sink", sink_kernel, static_cast<unsigned>(params.h_q), kThreads, 0,
                             stream, params);
  }
}

}  // namespace flash_mla
