// Joins the partial results of requests that the schedule split: out = sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m),
// in the order of the splits, so that the bits do not depend on which part came last. A partial result without a key
// has lse -inf and counts for nothing, whatever its memory holds.
//
// Every CTA lists the split requests of the schedule, then takes rows in turn. A row is 512 columns: 128 threads with
// four columns each. A CTA has two such groups: they take two rows at once where requests have few splits, and share
// one row's splits where they have many. Results and their weights are loaded together: a row costs one round trip to
// memory.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kGroupThreads = kHeadDimV / 4;
constexpr int kGroups = 2;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kCtasPerSm = 4;
constexpr int kUnroll = 4;
constexpr int kManySplits = 2 * kUnroll;
constexpr int kListed = 256;  // split requests per round of listing

struct SplitRequest {
  int request, first_partial, stride_partial, second_partial, num_splits;
  // Index of the i-th partial result. The first may lie in its part's second place; the others each begin their part.
  __device__ int partial(int i) const { return i == 0 ? first_partial : second_partial + (i - 1) * stride_partial; }
};

// A weighted sum of partial results: weights are relative to `largest`, base 2.
struct Sum {
  float4 value = make_float4(0, 0, 0, 0);
  float weight = 0;
  float largest = -INFINITY;

  __device__ void rescale(float to) {
    const float factor = largest == to ? 1.0f : exp2f(largest - to);
    value.x *= factor;
    value.y *= factor;
    value.z *= factor;
    value.w *= factor;
    weight *= factor;
    largest = to;
  }
  __device__ void add(float4 other, float factor) {
    value.x += factor * other.x;
    value.y += factor * other.y;
    value.z += factor * other.z;
    value.w += factor * other.w;
  }
};

struct Shared {
  SplitRequest requests[kListed];
  int first_item[kListed + 1];
  int count;
  float4 values[kGroupThreads];
  float weight, largest;
};

// The request that is split and begins in this part (fixed cuts: with this index).
__device__ bool split_request(const DenseDecodeParams& params, int index, SplitRequest& found) {
  if (params.schedule == nullptr) {
    const int request = params.first_request + index;
    const int blocks =
        max(ceil_div(min(max(params.cache_seqlens[request], 0), params.max_pages * params.page), kScheduleBlock), 1);
    const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
    found = {request, index * params.max_cuts, 1, index * params.max_cuts + 1, ceil_div(blocks, cut_blocks)};
    return cut_blocks < blocks;
  }
  const ScheduleRow& row = params.schedule[index];
  const int request = row.end_request;
  if (row.begin_request >= params.b || index + 1 >= params.num_parts ||
      params.schedule[index + 1].begin_request != request) {
    return false;
  }
  const bool only = row.begin_request == request;
  if (only && row.begin_block > 0) {
    return false;  // begins in an earlier part
  }
  const int num_splits = min(params.num_splits[request + 1] - params.num_splits[request], params.num_parts - index);
  found = {request, kPartialsPerPart * index + (only ? 0 : 1), kPartialsPerPart, kPartialsPerPart * (index + 1),
           num_splits};
  return true;
}

// One warp lists the split requests from `base` on, in order, with the number of work items before each.
__device__ void list_split_requests(const DenseDecodeParams& params, Shared& shared, int base, int num_candidates,
                                    int num_rows, int lane) {
  int count = 0, items = 0;
  const int end = min(base + kListed, num_candidates);
  for (int at = base; at < end; at += 32) {
    SplitRequest found;
    const bool is = at + lane < end && split_request(params, at + lane, found);
    const unsigned votes = __ballot_sync(~0u, is);
    const int mine = is ? (found.num_splits >= kManySplits ? num_rows : ceil_div(num_rows, kGroups)) : 0;
    int upto = mine;
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, upto, step);
      upto += lane >= step ? below : 0;
    }
    if (is) {
      const int index = count + __popc(votes & ((1u << lane) - 1));
      shared.requests[index] = found;
      shared.first_item[index] = items + upto - mine;
    }
    count += __popc(votes);
    items += __shfl_sync(~0u, upto, 31);
  }
  if (lane == 0) {
    shared.count = count;
    shared.first_item[count] = items;
  }
}

// The part of a row's sum that splits first, first + step, ... make.
__device__ Sum accumulate(const DenseDecodeParams& params, const SplitRequest& split, int64_t row_offset,
                          int64_t partial_rows, int first, int step, int column) {
  Sum sum;
  for (int i = first; i < split.num_splits; i += kUnroll * step) {
    float lse[kUnroll];
    float4 value[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * step;
      const bool exists = at < split.num_splits;
      const int64_t row = exists ? split.partial(at) * partial_rows + row_offset : 0;
      lse[u] = exists ? params.partial_lse[row] : -INFINITY;
      value[u] = exists ? *reinterpret_cast<const float4*>(params.partial_out + row * kHeadDimV + column)
                        : make_float4(0, 0, 0, 0);
    }
    float largest = sum.largest;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      largest = fmaxf(largest, lse[u]);
    }
    sum.rescale(largest);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (lse[u] > -INFINITY) {  // else the memory may hold anything
        const float factor = exp2f(lse[u] - largest);
        sum.weight += factor;
        sum.add(value[u], factor);
      }
    }
  }
  return sum;
}

template <class T>
__device__ void store_row(const DenseDecodeParams& params, int request, int token, int head, int column,
                          const Sum& sum) {
  const bool any_key = sum.weight > 0;
  const float sink = params.attn_sink && any_key ? exp2f(params.attn_sink[head] * device::kLog2E - sum.largest) : 0.0f;
  const float scale = any_key ? 1.0f / (sum.weight + sink) : 0.0f;
  T* out = static_cast<T*>(params.out) + request * params.stride_out_b + token * params.stride_out_s +
           head * params.stride_out_h + column;
  *reinterpret_cast<uint2*>(out) = make_uint2(device::pack2<T>(sum.value.x * scale, sum.value.y * scale),
                                              device::pack2<T>(sum.value.z * scale, sum.value.w * scale));
  if (column == 0) {
    params.lse[request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
        any_key ? (sum.largest + log2f(sum.weight)) * device::kLn2 : INFINITY;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    combine_kernel(const __grid_constant__ DenseDecodeParams params) {
  __shared__ Shared shared;
  const int thread = threadIdx.x, group = thread / kGroupThreads, column = thread % kGroupThreads * 4;
  const int num_rows = params.s_q * params.h_q;
  const int64_t partial_rows = static_cast<int64_t>(params.h_kv) * params.num_row_tiles * kRowTile;
  const int num_candidates = params.schedule == nullptr ? params.num_requests : params.num_parts;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  for (int base = 0; base < num_candidates; base += kListed) {
    __syncthreads();
    if (thread < 32) {
      list_split_requests(params, shared, base, num_candidates, num_rows, thread);
    }
    // The schedule is older than the kernel that wrote the partial results and started this one, so the list is made
    // while that one still runs.
    asm volatile("griddepcontrol.wait;" ::: "memory");
    __syncthreads();
    const int items = shared.first_item[shared.count];
    int index = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      while (shared.first_item[index + 1] <= item) {
        ++index;
      }
      const SplitRequest split = shared.requests[index];
      const bool together = split.num_splits >= kManySplits;
      const int row = together ? item - shared.first_item[index] : (item - shared.first_item[index]) * kGroups + group;
      // Rows of a partial tile: by key head, then token, then head within the group.
      const int token = row / params.h_q, head = row % params.h_q;
      const int64_t row_offset = static_cast<int64_t>(head / params.group) * params.num_row_tiles * kRowTile +
                                 token * params.group + head % params.group;
      Sum sum;
      if (row < num_rows) {
        sum = accumulate(params, split, row_offset, partial_rows, together ? group : 0, together ? kGroups : 1, column);
      }
      if (together) {
        if (group == 1) {
          shared.values[column / 4] = sum.value;
          shared.weight = sum.weight;
          shared.largest = sum.largest;
        }
        __syncthreads();
        if (group == 0) {
          const float largest = fmaxf(sum.largest, shared.largest);
          sum.rescale(largest);
          const float factor = shared.largest > -INFINITY ? exp2f(shared.largest - largest) : 0.0f;
          sum.weight += factor * shared.weight;
          sum.add(shared.values[column / 4], factor);
        }
        __syncthreads();
      }
      if (row < num_rows && (group == 0 || !together)) {
        store_row<T>(params, split.request, token, head, column, sum);
      }
    }
  }
}

}  // namespace

void launch_combine(const DenseDecodeParams& params, void* stream) {
  const auto kernel = params.element == Element::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  // No more requests can be split than there are, nor than there are cuts.
  const int64_t rows = static_cast<int64_t>(params.s_q) * params.h_q *
                       (params.schedule == nullptr    ? params.num_requests
                        : params.b < params.num_parts ? params.b
                                                      : params.num_parts);
  const int64_t full = static_cast<int64_t>(kCtasPerSm) * params.num_sms;
  device::launch_dependent("combine", kernel, static_cast<unsigned>(rows < full ? rows : full), kThreads, 0, stream,
                           params);
}

}  // namespace flash_mla
