// Around the backward of dense prefill: what it starts from, and the gradient of q from its sums.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kThreads = 256;
constexpr int kCtasPerSm = 8;

__device__ int64_t thread_of_grid() { return static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; }
__device__ int64_t threads_of_grid() { return static_cast<int64_t>(gridDim.x) * kThreads; }

// ---- Items.

// The last sequence whose first item is not behind `number`.
__device__ int find_sequence(const DensePrefillParams& params, int number) {
  int low = 0, high = params.plan->num_sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (params.planned[middle].first_item <= number ? low : high) = middle;
  }
  return low;
}

// Rounds of heads_together key heads; in a round, tiles of keys with their heads next to each other. In a causal call
// the first tile meets the most queries and so comes first. But where tiles take turns in adding to dq, those that meet
// a tile of queries first come first: a CTA waits only for items that have been handed out before its own.
__device__ BackwardItem item_of(const DensePrefillParams& params, bool takes_turns, int number) {
  const PrefillSequence sequence = params.planned[find_sequence(params, number)];
  const int within = number - sequence.first_item;
  const int round_items = sequence.tiles * sequence.heads_together, round = within / round_items;
  const int first_head = round * sequence.heads_together,
            heads = min(sequence.heads_together, params.h_kv - first_head);
  const int in_round = within - round * round_items, rank = in_round / heads;
  const int tile = params.causal && takes_turns ? sequence.tiles - 1 - rank : rank;
  const int first_key = tile * kBackwardKeyTile;
  const int unseeing = params.causal ? max(sequence.q_length() - sequence.k_length(), 0) : 0;
  BackwardItem item;
  item.first_query = sequence.q_begin + unseeing;
  item.num_queries = sequence.q_length() - unseeing;
  item.first_key = sequence.k_begin + first_key;
  item.num_keys = min(kBackwardKeyTile, sequence.k_length() - first_key);
  item.kv_head = first_head + in_round % heads;
  item.limit = params.causal ? sequence.k_length() - item.num_queries + 1 - first_key : item.num_keys;
  item.first_tile = params.causal ? max(1 - item.limit, 0) / kBackwardQueryTile : 0;
  item.key_tile = tile;
  return item;
}

// ---- Rows: deltas, and zeros for the sums.

template <class T>
__device__ float dot(const uint4& a, const uint4& b) {
  const uint32_t left[4] = {a.x, a.y, a.z, a.w}, right[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 x = unpack2<T>(left[i]), y = unpack2<T>(right[i]);
    sum = fmaf(x.x, y.x, fmaf(x.y, y.y, sum));
  }
  return sum;
}

constexpr int kTokensPerWarp = 8;

// A warp takes eight tokens of a head: half of a warp has a row, and each lane 8 of its columns.
template <class T>
__device__ void prepare_rows(const DensePrefillBackwardParams& params, int64_t unit, int lane) {
  const DensePrefillParams& forward = params.forward;
  const int head = unit % forward.h_q;
  const int64_t first = unit / forward.h_q * kTokensPerWarp;
  const int half = lane / 16, column = lane % 16 * 8;
  float own = 0;
#pragma unroll
  for (int i = 0; i < kTokensPerWarp / 2; ++i) {
    const int64_t token = first + 2 * i + half;
    float sum = 0;
    if (token < forward.tokens_q) {
      const T* d_out =
          static_cast<const T*>(params.d_out) + token * params.stride_do_t + head * params.stride_do_h + column;
      const T* out = static_cast<const T*>(forward.out) + (token * forward.h_q + head) * kPrefillHeadDimV + column;
      sum = dot<T>(*reinterpret_cast<const uint4*>(d_out), *reinterpret_cast<const uint4*>(out));
      float* row = params.dq_sum + (head * static_cast<int64_t>(forward.tokens_q) + token) * forward.d_qk;
      for (int j = lane % 16 * 4; j < forward.d_qk; j += 64) {
        *reinterpret_cast<float4*>(row + j) = make_float4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      sum += __shfl_xor_sync(~0u, sum, step);
    }
    const float other = __shfl_xor_sync(~0u, sum, 16);
    own = lane / 2 == i ? (lane % 2 == half ? sum : other) : own;
  }
  const int64_t token = first + lane;
  if (lane < kTokensPerWarp && token < forward.tokens_q) {
    const int64_t row = static_cast<int64_t>(head) * forward.tokens_q + token;
    // A row without keys has no gradients, whatever d_out is there.
    params.deltas[row] = forward.lse[row] == INFINITY
                             ? 0.0f
                             : own - params.d_lse[token * params.stride_dlse_t + head * params.stride_dlse_h];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) prepare_kernel(const __grid_constant__ DensePrefillBackwardParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const DensePrefillParams& forward = params.forward;
  const int num_items = forward.tokens_kv > 0 ? forward.plan->num_items : 0;
  for (int64_t i = thread_of_grid(); i < num_items; i += threads_of_grid()) {
    params.items[i] = item_of(forward, params.turns != nullptr, static_cast<int>(i));
  }
  const int64_t num_turns = params.turns != nullptr ? static_cast<int64_t>(forward.h_q) * forward.tokens_q : 0;
  for (int64_t i = thread_of_grid(); i < num_turns; i += threads_of_grid()) {
    params.turns[i] = 0;
  }
  const int64_t units = static_cast<int64_t>(ceil_div(forward.tokens_q, kTokensPerWarp)) * forward.h_q;
  for (int64_t unit = thread_of_grid() / 32; unit < units; unit += threads_of_grid() / 32) {
    prepare_rows<T>(params, unit, threadIdx.x % 32);
  }
}

// ---- The gradient of q.

constexpr int kFinishedTokens = 4;

// A warp takes four tokens of a head, whose sums lie together.
template <class T, int kHeadDim>
__device__ void finish_rows(const DensePrefillBackwardParams& params, int64_t unit, int lane) {
  constexpr int kRowUnits = kHeadDim / 8, kLaneUnits = kFinishedTokens * kRowUnits / 32;
  const DensePrefillParams& forward = params.forward;
  const int head = unit % forward.h_q;
  const int64_t first = unit / forward.h_q * kFinishedTokens;
  const int units = min(static_cast<int64_t>(kFinishedTokens), forward.tokens_q - first) * kRowUnits;
  const auto* sums = reinterpret_cast<const float4*>(params.dq_sum) +
                     (head * static_cast<int64_t>(forward.tokens_q) + first) * (kHeadDim / 4);
  float4 low[kLaneUnits], high[kLaneUnits];
#pragma unroll
  for (int i = 0; i < kLaneUnits; ++i) {
    if (const int at = lane + 32 * i; at < units) {
      low[i] = sums[2 * at], high[i] = sums[2 * at + 1];
    }
  }
  const float scale = params.forward.softmax_scale;
#pragma unroll
  for (int i = 0; i < kLaneUnits; ++i) {
    if (const int at = lane + 32 * i; at < units) {
      const int64_t row = (first + at / kRowUnits) * forward.h_q + head;
      reinterpret_cast<uint4*>(params.dq)[row * kRowUnits + at % kRowUnits] =
          make_uint4(pack2<T>(low[i].x * scale, low[i].y * scale), pack2<T>(low[i].z * scale, low[i].w * scale),
                     pack2<T>(high[i].x * scale, high[i].y * scale), pack2<T>(high[i].z * scale, high[i].w * scale));
    }
  }
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ DensePrefillBackwardParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  const int64_t units = static_cast<int64_t>(ceil_div(params.forward.tokens_q, kFinishedTokens)) * params.forward.h_q;
  for (int64_t unit = thread_of_grid() / 32; unit < units; unit += threads_of_grid() / 32) {
    finish_rows<T, kHeadDim>(params, unit, threadIdx.x % 32);
  }
}

unsigned grid_of(const DensePrefillBackwardParams& params) {
  return static_cast<unsigned>(params.forward.num_sms) * kCtasPerSm;
}

template <class T>
void launch_finish(const DensePrefillBackwardParams& params, void* stream) {
  const auto kernel = params.forward.d_qk == 192 ? finish_kernel<T, 192> : finish_kernel<T, 128>;
  device::launch_dependent("prefill_backward_finish", kernel, grid_of(params), kThreads, 0, stream, params);
}

}  // namespace

void launch_prefill_backward_prepare(const DensePrefillBackwardParams& params, void* stream) {
  const auto kernel = params.element == Element::kFloat16 ? prepare_kernel<__half> : prepare_kernel<__nv_bfloat16>;
  device::launch_dependent("prefill_backward_prepare", kernel, grid_of(params), kThreads, 0, stream, params);
}

void launch_prefill_backward_finish(const DensePrefillBackwardParams& params, void* stream) {
  params.element == Element::kFloat16 ? launch_finish<__half>(params, stream)
                                      : launch_finish<__nv_bfloat16>(params, stream);
}

}  // namespace flash_mla
