// The plan of dense prefill, made on the device by one CTA: any number of sequences, no word from the host.
//
// Running lengths are taken as they come, so nothing is believed: an end is clamped to the tensor, and no sequence
// begins before the one in front of it has ended. Query tokens that no sequence has form one more, without keys.
// Sequences are put in the order of falling numbers of keys (in steps of 128, counted up to 131,072), so that the last
// items that are handed out are small ones.
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kClasses = kThreads;  // of length
constexpr int kKeysPerClass = 128;

// Keys and values of the heads that are computed together take so many bytes of L2. It is also about the least that
// keeps the last CTAs of a causal call equally busy: heads_together * tiles^2 / 2 items' work is worth a whole item to
// each of 132 CTAs, where tiles is the number of row tiles of a sequence.
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

__device__ int length_class(int keys) { return kClasses - 1 - min(ceil_div(keys, kKeysPerClass), kClasses - 1); }

// Calls f(sequence) for this thread's run of sequences, in order.
template <class F>
__device__ void for_own_sequences(const DensePrefillParams& params, int begin, int end, int q_start, int k_start,
                                  F&& f) {
  const Running q{params.cu_seqlens_qo + 1, params.tokens_q}, k{params.cu_seqlens_kv + 1, params.tokens_kv};
  for (int i = begin; i < end; ++i) {
    const bool rest = i == params.num_sequences;
    const int q_end = max(q_start, rest ? params.tokens_q : q.end(i)), k_end = max(k_start, rest ? 0 : k.end(i));
    if (q_end > q_start) {
      f(PrefillSequence{0, q_start, q_end - q_start, k_start, k_end - k_start,
                        ceil_div(q_end - q_start, kPrefillRowTile), 0, 0});
    }
    q_start = q_end, k_start = k_end;
  }
}

__device__ int heads_together(const DensePrefillParams& params, int keys) {
  const int64_t bytes_per_head = static_cast<int64_t>(max(keys, 1)) * (params.d_qk + kPrefillHeadDimV) * 2;
  const int64_t at_once = min(max(kBytesTogether / bytes_per_head, int64_t{1}), static_cast<int64_t>(params.h_kv));
  const int rounds = ceil_div(params.h_kv, static_cast<int>(at_once));
  return ceil_div(params.h_kv, rounds) * params.group;
}

__global__ void __launch_bounds__(kThreads) prefill_plan_kernel(const __grid_constant__ DensePrefillParams params) {
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

  for_own_sequences(params, begin, end, q_start, k_start, [&](const PrefillSequence& sequence) {
    atomicAdd(&shared.class_size[length_class(sequence.k_length)], 1);
  });
  __syncthreads();
  int num_sequences;
  const int own_size = shared.class_size[threadIdx.x];
  const int position = exclusive_scan<Sum>(shared, own_size, num_sequences);
  shared.class_size[threadIdx.x] = position;
  __syncthreads();
  for_own_sequences(params, begin, end, q_start, k_start, [&](const PrefillSequence& sequence) {
    PrefillSequence& place = params.planned[atomicAdd(&shared.class_size[length_class(sequence.k_length)], 1)];
    place = sequence;
    place.heads_together = heads_together(params, sequence.k_length);
  });
  __syncthreads();

  const int planned_run = ceil_div(num_sequences, kThreads);
  const int first = min(static_cast<int>(threadIdx.x) * planned_run, num_sequences),
            last = min(first + planned_run, num_sequences);
  int items = 0, num_items;
  for (int i = first; i < last; ++i) {
    items += params.planned[i].row_tiles * params.h_q;
  }
  int item = exclusive_scan<Sum>(shared, items, num_items);
  for (int i = first; i < last; ++i) {
    params.planned[i].first_item = item;
    item += params.planned[i].row_tiles * params.h_q;
  }
  if (threadIdx.x == 0) {
    *params.plan = {num_items, num_sequences, 0, {}};
  }
}

}  // namespace

void launch_prefill_plan(const DensePrefillParams& params, void* stream) {
  device::launch_dependent("prefill_plan", prefill_plan_kernel, 1, kThreads, 0, stream, params);
}

}  // namespace flash_mla
