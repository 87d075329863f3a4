// Joins the partial results of requests that the schedule split: out = sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m), in the order of the splits, so that the bits do not depend on
// which part came last. A partial result without a key has lse -inf and is not read.
//
// Every CTA lists the split requests of the schedule, then takes rows in turn. A row is 512 columns: 128 threads with four columns each. A CTA has four such groups: they take four
// rows at once where requests have few splits, and share one row's splits where they have many.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kGroupThreads = kHeadDimV / 4;
constexpr int kGroups = 4;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kManySplits = 8;
constexpr int kUnroll = 4;
constexpr int kListed = 1024;  // split requests per round of listing

struct SplitRequest {
  int request, first_partial, stride_partial, second_partial, num_splits;
  // Index of the i-th partial result. The first may lie in its part's second place; the others each begin their part.
  __device__ int partial(int i) const { return i == 0 ? first_partial : second_partial + (i - 1) * stride_partial; }
};

struct Shared {
  SplitRequest requests[kListed];
  int first_item[kListed + 1];
  int count;
  float4 sums[kGroups][kGroupThreads];
  float weights[kGroups];
};

// The request that is split and begins in this part (fixed cuts: with this index).
__device__ bool split_request(const DenseDecodeParams& params, int index, SplitRequest& found) {
  if (params.schedule == nullptr) {
    const int request = params.first_request + index;
    const int blocks = max(ceil_div(min(max(params.cache_seqlens[request], 0), params.max_pages * params.page), kScheduleBlock), 1);
    const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
    found = {request, index * params.max_cuts, 1, index * params.max_cuts + 1, ceil_div(blocks, cut_blocks)};
    return cut_blocks < blocks;
  }
  const ScheduleRow& row = params.schedule[index];
  const int request = row.end_request;
  if (row.begin_request >= params.b || index + 1 >= params.num_parts || params.schedule[index + 1].begin_request != request) {
    return false;
  }
  const bool only = row.begin_request == request;
  if (only && row.begin_block > 0) {
    return false;  // begins in an earlier part
  }
  const int num_splits = min(params.num_splits[request + 1] - params.num_splits[request], params.num_parts - index);
  found = {request, kPartialsPerPart * index + (only ? 0 : 1), kPartialsPerPart, kPartialsPerPart * (index + 1), num_splits};
  return true;
}

template <class T>
__device__ void store_row(const DenseDecodeParams& params, int request, int row, int column, float4 sum, float weight, float largest) {
  const int token = row / params.h_q, head = row % params.h_q;
  const bool any_key = weight > 0;
  const float sink = params.attn_sink && any_key ? exp2f(params.attn_sink[head] * device::kLog2E - largest) : 0.0f;
  const float scale = any_key ? 1.0f / (weight + sink) : 0.0f;
  T* out = static_cast<T*>(params.out) + request * params.stride_out_b + token * params.stride_out_s + head * params.stride_out_h + column;
  *reinterpret_cast<uint2*>(out) = make_uint2(device::pack2<T>(sum.x * scale, sum.y * scale), device::pack2<T>(sum.z * scale, sum.w * scale));
  if (column == 0) {
    params.lse[request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] = any_key ? (largest + log2f(weight)) * device::kLn2 : INFINITY;
  }
}

// The part of a row's sum that splits first, first + step, ... make.
__device__ void accumulate(const DenseDecodeParams& params, const SplitRequest& split, int64_t row_offset, int64_t partial_rows, int first, int step, float largest, int column,
                           float4& sum, float& weight) {
  for (int i = first; i < split.num_splits; i += kUnroll * step) {
    float factor[kUnroll];
    float4 value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * step;
      const int64_t row = at < split.num_splits ? split.partial(at) * partial_rows + row_offset : 0;
      const float lse = at < split.num_splits ? params.partial_lse[row] : -INFINITY;
      const bool counts = lse > -INFINITY;
      factor[u] = counts ? exp2f(lse - largest) : 0.0f;
      value[u] = counts ? *reinterpret_cast<const float4*>(params.partial_out + row * kHeadDimV + column) : make_float4(0, 0, 0, 0);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      weight += factor[u];
      sum.x += factor[u] * value[u].x;
      sum.y += factor[u] * value[u].y;
      sum.z += factor[u] * value[u].z;
      sum.w += factor[u] * value[u].w;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ DenseDecodeParams params) {
  __shared__ Shared shared;
  const int thread = threadIdx.x, group = thread / kGroupThreads, column = thread % kGroupThreads * 4;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int num_rows = params.s_q * params.h_q;
  const int64_t partial_rows = static_cast<int64_t>(params.h_kv) * params.num_row_tiles * kRowTile;
  const int num_candidates = params.schedule == nullptr ? params.num_requests : params.num_parts;

  for (int base = 0; base < num_candidates; base += kListed) {
    __syncthreads();
    // One warp lists in order; candidates are few.
    if (thread < 32) {
      int count = 0, items = 0;
      for (int at = base; at < min(base + kListed, num_candidates); at += 32) {
        SplitRequest found;
        const bool is = at + thread < min(base + kListed, num_candidates) && split_request(params, at + thread, found);
        const unsigned votes = __ballot_sync(~0u, is);
        const int mine = is ? (found.num_splits >= kManySplits ? num_rows : ceil_div(num_rows, kGroups)) : 0;
        int upto = mine;
        for (int step = 1; step < 32; step *= 2) {
          const int below = __shfl_up_sync(~0u, upto, step);
          upto += thread >= step ? below : 0;
        }
        if (is) {
          const int index = count + __popc(votes & ((1u << thread) - 1));
          shared.requests[index] = found;
          shared.first_item[index] = items + upto - mine;
        }
        count += __popc(votes);
        items += __shfl_sync(~0u, upto, 31);
      }
      if (thread == 0) {
        shared.count = count;
        shared.first_item[count] = items;
      }
    }
    __syncthreads();
    const int count = shared.count, items = shared.first_item[count];
    int index = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      while (shared.first_item[index + 1] <= item) {
        ++index;
      }
      const SplitRequest split = shared.requests[index];
      const bool together = split.num_splits >= kManySplits;
      const int row = together ? item - shared.first_item[index] : (item - shared.first_item[index]) * kGroups + group;
      const bool exists = row < num_rows;
      // Rows of a partial tile: by key head, then token, then head within the group.
      const int token = row / params.h_q, head = row % params.h_q;
      const int64_t row_offset = static_cast<int64_t>(head / params.group) * params.num_row_tiles * kRowTile + token * params.group + head % params.group;
      float largest = -INFINITY;
      for (int i = thread % 32; exists && i < split.num_splits; i += 32) {
        largest = fmaxf(largest, params.partial_lse[split.partial(i) * partial_rows + row_offset]);
      }
      for (int step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
      }
      float4 sum = make_float4(0, 0, 0, 0);
      float weight = 0;
      if (exists) {
        accumulate(params, split, row_offset, partial_rows, together ? group : 0, together ? kGroups : 1, largest, column, sum, weight);
      }
      if (together) {
        shared.sums[group][column / 4] = sum;
        if (column == 0) {
          shared.weights[group] = weight;
        }
        __syncthreads();
        if (group == 0) {
          for (int g = 1; g < kGroups; ++g) {
            const float4 other = shared.sums[g][column / 4];
            sum.x += other.x;
            sum.y += other.y;
            sum.z += other.z;
            sum.w += other.w;
            weight += shared.weights[g];
          }
          store_row<T>(params, split.request, row, column, sum, weight, largest);
        }
        __syncthreads();
      } else if (exists) {
        store_row<T>(params, split.request, row, column, sum, weight, largest);
      }
    }
  }
}

}  // namespace

void launch_combine(const DenseDecodeParams& params, void* stream) {
  constexpr unsigned kCtas = 264;
  const auto kernel = params.element == Element::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  device::launch_dependent("combine", kernel, kCtas, kThreads, 0, stream, params);
}

}  // namespace flash_mla
