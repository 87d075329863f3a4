// The plan of dense prefill, made on the device by one CTA: any number of sequences, no word from the host.
//
// Running lengths are taken as they come, so nothing is believed: an end is clamped to the tensor, and no sequence
// begins before the one in front of it has ended. Query tokens that no sequence has form one more, without keys; in the
// backward keys that no sequence has form one without queries. An item is a tile of query rows, which meets the keys,
// in the backward a tile of keys, which meets the queries. Sequences are put in the order of falling numbers of what
// their items meet (in steps of 128, counted up to 131,072), so that the last items that are handed out are small ones.
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = kThreads;  // of length
constexpr int kTokensPerClass = 128;

// What the heads that are computed together read again and again, or add to, takes so many bytes of L2. It is also
// about the least that keeps the last CTAs of a causal call equally busy: heads_together * tiles^2 / 2 items' work is
// worth a whole item to each of 132 CTAs, where tiles is the number of row tiles of a sequence.
constexpr int64_t kBytesTogether = 24 << 20;

struct Shared {
  int warp_values[kWarps];
  int class_size[kClasses];
};

struct Larger {
  static constexpr int kNeutral = 0;
  __device__ int operator()(int a, int b) const { return max(a, b); }
};

struct Sum {
  static constexpr int kNeutral = 0;
  __device__ int operator()(int a, int b) const { return a + b; }
};

// What the values of the threads before this one come to; `total`: those of all.
template <class Operator>
__device__ int exclusive_scan(Shared& shared, int value, int& total) {
  const Operator join;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int below = __shfl_up_sync(~0u, inclusive, step);
    inclusive = lane >= step ? join(inclusive, below) : inclusive;
  }
  __syncthreads();
  if (lane == 31) {
    shared.warp_values[warp] = inclusive;
  }
  __syncthreads();
  int before = Operator::kNeutral;
  total = Operator::kNeutral;
  for (int w = 0; w < kWarps; ++w) {
    before = w < warp ? join(before, shared.warp_values[w]) : before;
    total = join(total, shared.warp_values[w]);
  }
  const int below = __shfl_up_sync(~0u, inclusive, 1);
  return lane > 0 ? join(before, below) : before;
}

// The running lengths of one tensor, within 0 and its tokens.
struct Running {
  const int32_t* ends;  // of sequence i: entry i
  int tokens;
  __device__ int end(int i) const { return min(max(ends[i], 0), tokens); }
};

template <bool kBackward>
__device__ int length_class(const PrefillSequence& sequence) {
  const int met = kBackward ? sequence.q_length() : sequence.k_length();
  return kClasses - 1 - min(ceil_div(met, kTokensPerClass), kClasses - 1);
}

// Calls f(sequence) for this thread's run of sequences, in order.
template <bool kBackward, class F>
__device__ void for_own_sequences(const DensePrefillParams& params, int begin, int end, int q_start, int k_start,
                                  F&& f) {
  const Running q{params.cu_seqlens_qo + 1, params.tokens_q}, k{params.cu_seqlens_kv + 1, params.tokens_kv};
  for (int i = begin; i < end; ++i) {
    const bool rest = i == params.num_sequences;
    const int q_rest = kBackward ? 0 : params.tokens_q, k_rest = kBackward ? params.tokens_kv : 0;
    const int q_end = max(q_start, rest ? q_rest : q.end(i)), k_end = max(k_start, rest ? k_rest : k.end(i));
    const int tiles =
        kBackward ? ceil_div(k_end - k_start, kBackwardKeyTile) : ceil_div(q_end - q_start, params.row_tile);
    if (tiles > 0) {
      f(PrefillSequence{0, q_start, q_end, k_start, k_end, tiles, 0, 0});
    }
    q_start = q_end, k_start = k_end;
  }
}

// Keys and values, or queries, gradients of the output and float32 gradients of the queries.
template <bool kBackward>
__device__ int heads_together(const DensePrefillParams& params, const PrefillSequence& sequence) {
  const int64_t met = kBackward ? static_cast<int64_t>(sequence.q_length()) * params.group : sequence.k_length();
  const int64_t bytes_per_head =
      max(met, int64_t{1}) * ((params.d_qk + kPrefillHeadDimV) * 2 + (kBackward ? params.d_qk * 4 : 0));
  const int64_t at_once = min(max(kBytesTogether / bytes_per_head, int64_t{1}), static_cast<int64_t>(params.h_kv));
  const int rounds = ceil_div(params.h_kv, static_cast<int>(at_once));
  return ceil_div(params.h_kv, rounds) * (kBackward ? 1 : params.group);
}

template <bool kBackward>
__global__ void __launch_bounds__(kThreads, 1) prefill_plan_kernel(const __grid_constant__ DensePrefillParams params) {
  __shared__ Shared shared;
  shared.class_size[threadIdx.x] = 0;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // One more than there are: the tokens of none.
  const int count = params.num_sequences + 1, run = ceil_div(count, kThreads);
  const int begin = min(static_cast<int>(threadIdx.x) * run, count), end = min(begin + run, count);
  const Running q{params.cu_seqlens_qo + 1, params.tokens_q}, k{params.cu_seqlens_kv + 1, params.tokens_kv};
  int q_largest = 0, k_largest = 0, unused;
  for (int i = begin; i < min(end, params.num_sequences); ++i) {
    q_largest = max(q_largest, q.end(i));
    k_largest = max(k_largest, k.end(i));
  }
  const int q_start = exclusive_scan<Larger>(shared, q_largest, unused),
            k_start = exclusive_scan<Larger>(shared, k_largest, unused);

  for_own_sequences<kBackward>(params, begin, end, q_start, k_start, [&](const PrefillSequence& sequence) {
    atomicAdd(&shared.class_size[length_class<kBackward>(sequence)], 1);
  });
  __syncthreads();
  int num_sequences;
  const int own_size = shared.class_size[threadIdx.x];
  const int position = exclusive_scan<Sum>(shared, own_size, num_sequences);
  shared.class_size[threadIdx.x] = position;
  __syncthreads();
  for_own_sequences<kBackward>(params, begin, end, q_start, k_start, [&](const PrefillSequence& sequence) {
    PrefillSequence& place = params.planned[atomicAdd(&shared.class_size[length_class<kBackward>(sequence)], 1)];
    place = sequence;
    place.heads_together = heads_together<kBackward>(params, sequence);
  });
  __syncthreads();

  const int planned_run = ceil_div(num_sequences, kThreads);
  const int first = min(static_cast<int>(threadIdx.x) * planned_run, num_sequences),
            last = min(first + planned_run, num_sequences);
  const int heads = kBackward ? params.h_kv : params.h_q;
  int items = 0, num_items;
  for (int i = first; i < last; ++i) {
    items += params.planned[i].tiles * heads;
  }
  int item = exclusive_scan<Sum>(shared, items, num_items);
  for (int i = first; i < last; ++i) {
    params.planned[i].first_item = item;
    item += params.planned[i].tiles * heads;
  }
  if (threadIdx.x == 0) {
    *params.plan = {num_items, num_sequences, 0, {}};
  }
}

}  // namespace

void launch_prefill_plan(const DensePrefillParams& params, void* stream) {
  device::launch_dependent("prefill_plan", prefill_plan_kernel<false>, 1, kThreads, 0, stream, params);
}

void launch_prefill_backward_plan(const DensePrefillBackwardParams& params, void* stream) {
  device::launch_dependent("prefill_backward_plan", prefill_plan_kernel<true>, 1, kThreads, 0, stream, params.forward);
}

}  // namespace flash_mla
