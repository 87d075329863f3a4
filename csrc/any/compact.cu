// Compacts index lists for the batch-invariant mode of sparse attention: a query's bits shall depend on the slots that
// it selects and on their order, not on where indices of nothing stand between them. So the kernel gets lists without
// these.
//
// A CTA takes a list at a time, in steps of so many indices for each warp, which lie one behind the other: votes tell
// an index its place among its warp's, counts in shared memory those of the warps before it.
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kUnroll = 4;  // indices in flight per lane
constexpr int kWarpStep = 32 * kUnroll;
constexpr int kCtasPerSm = 8;

using Counts = int[2][kWarps];

// Returns how many indices count. `parity` says which counts no warp reads any more.
__device__ __forceinline__ int compact(const int32_t* list, int length, uint32_t num_slots, int32_t* to, Counts& counts,
                                       int& parity) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned below = (1u << lane) - 1, end = length;
  int written = 0;
  for (unsigned base = 0; base < end; base += kWarps * kWarpStep) {
    uint32_t index[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const unsigned at = base + warp * kWarpStep + u * 32 + lane;
      index[u] = at < end ? static_cast<uint32_t>(list[at]) : UINT32_MAX;
    }
    unsigned votes[kUnroll];
    int own = 0;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      votes[u] = __ballot_sync(~0u, index[u] < num_slots);
      own += __popc(votes[u]);
    }
    if (lane == 0) {
      counts[parity][warp] = own;
    }
    __syncthreads();
    int before = written;
    for (int w = 0; w < kWarps; ++w) {
      before += w < warp ? counts[parity][w] : 0;
      written += counts[parity][w];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (index[u] < num_slots) {
        to[before + __popc(votes[u] & below)] = static_cast<int32_t>(index[u]);
      }
      before += __popc(votes[u]);
    }
    parity ^= 1;
  }
  return written;
}

__global__ void __launch_bounds__(kThreads) compact_kernel(const __grid_constant__ CompactParams params) {
  __shared__ Counts counts;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  int parity = 0;
  for (int item = blockIdx.x; item < params.num_tokens; item += gridDim.x) {
    const int token = params.first_token + item, batch = token / params.s_q, query = token - batch * params.s_q;
    for (int source = 0; source < 2; ++source) {
      const KeySource& keys = params.keys[source];
      if (keys.topk == 0) {
        continue;
      }
      const int length =
          keys.lengths == nullptr
              ? keys.topk
              : min(max(keys.lengths[batch * keys.stride_lengths_b + query * keys.stride_lengths_s], 0), keys.topk);
      const int found =
          compact(keys.indices + batch * keys.stride_indices_b + query * keys.stride_indices_s, length, keys.num_slots,
                  params.compacted[source] + static_cast<int64_t>(item) * keys.topk, counts, parity);
      if (threadIdx.x == 0) {
        params.lengths[source][item] = found;
      }
    }
  }
}

}  // namespace

void launch_compact(const CompactParams& params, void* stream) {
  const int full = kCtasPerSm * params.num_sms;
  device::launch_dependent("compact", compact_kernel,
                           static_cast<unsigned>(params.num_tokens < full ? params.num_tokens : full), kThreads, 0,
                           stream, params);
}

}  // namespace flash_mla
