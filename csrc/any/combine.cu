// Joins the partial results of requests that the schedule split: out = sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m),
// in the order of the splits, so that the bits do not depend on which part came last. A partial result without a key
// has lse -inf and counts for nothing, whatever its memory holds.
//
// Every CTA lists the split requests of the schedule, then takes work in turn. A unit of work is one warp wide: 32
// columns of a group of 16 rows, of which each lane has two rows and four pairs of columns, as the accumulators of the
// decode kernel had them. So a lane's weights serve 16 values, and loads are runs of 512 bytes. Where there are fewer
// units than warps, several warps of a CTA share a unit's splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kUnitBlocks = 4;                             // of 8 columns
constexpr int kGroupUnits = kPartialBlocks / kUnitBlocks;  // units of a group of 16 rows
constexpr int kCtasPerSm = 2;
constexpr int kUnroll = 4;         // partial results in flight per warp
constexpr int kListed = kThreads;  // candidates per round of listing

// The batch-invariant mode sums in an order that depends on the request alone.
constexpr int kFixedSharing = 4;

struct SplitRequest {
  int request, num_splits;
  // Indices of the partial results: the first may lie in its part's second place, the others each begin their part.
  int first_partial, second_partial, stride_partial;
};

// Stands for the logarithm of a sum without a key: finite, so that differences are numbers, and far below any other.
constexpr float kNoKey = -1e38f;

// A lane's weighted sum of partial results. Weights are relative to `largest`, base 2; index 0 is row lane / 4 of the
// group, 1 the row 8 further.
struct Sum {
  float4 value[kUnitBlocks] = {};  // (row 0, column 0), (0, 1), (1, 0), (1, 1)
  float weight[2] = {0, 0};
  float largest[2] = {kNoKey, kNoKey};

  __device__ __forceinline__ void rescale(float to0, float to1) {
    const float x = device::exp2_approx(largest[0] - to0), y = device::exp2_approx(largest[1] - to1);
    for (float4& v : value) {
      v = make_float4(v.x * x, v.y * x, v.z * y, v.w * y);
    }
    weight[0] *= x;
    weight[1] *= y;
    largest[0] = to0;
    largest[1] = to1;
  }
  // `other` is relative to `other_largest`, which is not above `largest`.
  __device__ __forceinline__ void add(const float4 (&other)[kUnitBlocks], const float (&other_weight)[2],
                                      const float (&other_largest)[2]) {
    const float x = device::exp2_approx(other_largest[0] - largest[0]),
                y = device::exp2_approx(other_largest[1] - largest[1]);
    weight[0] = fmaf(x, other_weight[0], weight[0]);
    weight[1] = fmaf(y, other_weight[1], weight[1]);
#pragma unroll
    for (int b = 0; b < kUnitBlocks; ++b) {
      value[b] = make_float4(fmaf(x, other[b].x, value[b].x), fmaf(x, other[b].y, value[b].y),
                             fmaf(y, other[b].z, value[b].z), fmaf(y, other[b].w, value[b].w));
    }
  }
};

struct Shared {
  SplitRequest requests[kListed];
  int warp_counts[kWarps], warp_most[kWarps];
  Sum sums[kWarps][32];
};

// The request that is split and begins in this part (fixed cuts: with this index).
__device__ bool split_request(const DenseDecodeParams& params, int index, SplitRequest& found) {
  if (params.schedule == nullptr) {
    const int request = params.first_request + index;
    const int blocks =
        max(ceil_div(min(max(params.cache_seqlens[request], 0), params.max_pages * params.page), kScheduleBlock), 1);
    const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
    found = {request, ceil_div(blocks, cut_blocks), index * params.max_cuts, index * params.max_cuts + 1, 1};
    return cut_blocks < blocks;
  }
  const ScheduleRow& row = params.schedule[index];
  const int begin_request = row.begin_request, begin_block = row.begin_block, request = row.end_request;
  const int next_begin_request = index + 1 < params.num_parts ? params.schedule[index + 1].begin_request : -1;
  const bool only = begin_request == request;
  if (begin_request >= params.b || next_begin_request != request || (only && begin_block > 0)) {
    return false;  // without work, not split, or begun in an earlier part
  }
  const int num_splits = min(params.num_splits[request + 1] - params.num_splits[request], params.num_parts - index);
  found = {request, num_splits, kPartialsPerPart * index + (only ? 0 : 1), kPartialsPerPart * (index + 1),
           kPartialsPerPart};
  return true;
}

// Lists the split requests from `base` on, in order, one candidate a thread: on an SM that the decode kernel has just
// left this is time that the whole call takes longer.
__device__ void list_split_requests(const DenseDecodeParams& params, Shared& shared, int base, int num_candidates) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = base + static_cast<int>(threadIdx.x);
  SplitRequest found;
  const bool is = at < num_candidates && split_request(params, at, found);
  const unsigned votes = __ballot_sync(~0u, is);
  const int most = __reduce_max_sync(~0u, is ? found.num_splits : 0);
  __syncthreads();  // the list of the round before has been read
  if (lane == 0) {
    shared.warp_counts[warp] = __popc(votes);
    shared.warp_most[warp] = most;
  }
  __syncthreads();
  int before = 0;
  for (int w = 0; w < warp; ++w) {
    before += shared.warp_counts[w];
  }
  if (is) {
    shared.requests[before + __popc(votes & ((1u << lane) - 1))] = found;
  }
  __syncthreads();
}

// How many warps share a unit: as many as leave no warp of the grid without work.
__device__ int choose_sharing(int num_groups, int most_splits) {
  int sharing = 1;
  while (sharing < kWarps && 2 * sharing <= most_splits &&
         num_groups * kGroupUnits / kWarps * sharing <= static_cast<int>(gridDim.x)) {
    sharing *= 2;
  }
  return sharing;
}

// What splits first, first + step, ... make. `values` and `lses` are where the lane's share lies in partial result 0.
__device__ __forceinline__ Sum accumulate(const SplitRequest& split, const float* values, const float* lses,
                                          int partial_tiles, int first, int step) {
  Sum sum;
#pragma unroll 1
  for (int i = first; i < split.num_splits; i += kUnroll * step) {
    float lse[kUnroll][2];
    float4 value[kUnroll][kUnitBlocks];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int at = i + u * step;
      const bool exists = at < split.num_splits;
      const int tile =
          (at == 0 ? split.first_partial : split.second_partial + (at - 1) * split.stride_partial) * partial_tiles;
      lse[u][0] = lse[u][1] = -INFINITY;
      if (exists) {
        const float2 pair = *reinterpret_cast<const float2*>(lses + static_cast<int64_t>(tile) * kRowTile);
        lse[u][0] = pair.x;
        lse[u][1] = pair.y;
      }
#pragma unroll
      for (int b = 0; b < kUnitBlocks; ++b) {
        value[u][b] = make_float4(0, 0, 0, 0);
        if (exists) {
          value[u][b] =
              *reinterpret_cast<const float4*>(values + static_cast<int64_t>(tile) * kPartialTile + b * kPartialBlock);
        }
      }
    }
    float largest[2] = {sum.largest[0], sum.largest[1]};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      largest[0] = fmaxf(largest[0], lse[u][0]);
      largest[1] = fmaxf(largest[1], lse[u][1]);
    }
    sum.rescale(largest[0], largest[1]);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      sum.add(value[u], {1, 1}, lse[u]);
    }
  }
  return sum;
}

// The sums of the warps that share a unit, joined by the first of them, which returns true.
__device__ __forceinline__ bool join(Shared& shared, int warp, int lane, int sharing, Sum& sum) {
  if (sharing == 1) {
    return true;
  }
  __syncthreads();  // the sums of the unit before have been read
  shared.sums[warp][lane] = sum;
  __syncthreads();
  if (warp % sharing != 0) {
    return false;
  }
#pragma unroll 1
  for (int w = 1; w < sharing; ++w) {
    const Sum& other = shared.sums[warp + w][lane];
    sum.rescale(fmaxf(sum.largest[0], other.largest[0]), fmaxf(sum.largest[1], other.largest[1]));
    sum.add(other.value, other.weight, other.largest);
  }
  return true;
}

// The lane's share of row `row` of the rows of a key head, 8 of the unit's 32 columns after a transposition, or nothing
// where there is no such row.
template <class T>
__device__ __forceinline__ void store_row(const DenseDecodeParams& params, int request, int kv_head, int row,
                                          int column, int lane, const Sum& sum, int r) {
  const bool exists = row < params.s_q * params.group, any_key = sum.weight[r] != 0;
  const int token = row / params.group, head = kv_head * params.group + row - token * params.group;
  const float sink =
      params.attn_sink && exists && any_key ? exp2f(params.attn_sink[head] * device::kLog2E - sum.largest[r]) : 0.0f;
  const float scale = any_key ? 1.0f / (sum.weight[r] + sink) : 0.0f;
  uint32_t words[kUnitBlocks];
#pragma unroll
  for (int b = 0; b < kUnitBlocks; ++b) {
    const float4& v = sum.value[b];
    words[b] = device::pack2<T>((r == 0 ? v.x : v.z) * scale, (r == 0 ? v.y : v.w) * scale);
  }
  device::transpose_quad(words, lane);
  if (exists) {
    T* out = static_cast<T*>(params.out) + request * params.stride_out_b + token * params.stride_out_s +
             head * params.stride_out_h + column + lane % 4 * 8;
    *reinterpret_cast<uint4*>(out) = make_uint4(words[0], words[1], words[2], words[3]);
    if (column == 0 && lane % 4 == 0) {
      params.lse[request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
          any_key ? (sum.largest[r] + log2f(sum.weight[r])) * device::kLn2 : INFINITY;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads, kCtasPerSm)
    combine_kernel(const __grid_constant__ DenseDecodeParams params) {
  __shared__ Shared shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups_per_head = ceil_div(params.s_q * params.group, 16), groups = groups_per_head * params.h_kv;
  const int partial_tiles = params.h_kv * params.num_row_tiles;
  const int num_candidates = params.schedule == nullptr ? params.num_requests : params.num_parts;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // The schedule and the lengths are older than the kernel that wrote the partial results and started this one: what
  // follows from them is done while that one still runs.
  bool waited = false;
  for (int base = 0; base < num_candidates; base += kListed) {
    list_split_requests(params, shared, base, num_candidates);
    int count = 0, most_splits = 0;
    for (int w = 0; w < kWarps; ++w) {
      count += shared.warp_counts[w];
      most_splits = max(most_splits, shared.warp_most[w]);
    }
    const int sharing = params.schedule == nullptr ? kFixedSharing : choose_sharing(count * groups, most_splits);
    const int cta_units = kWarps / sharing, ctas_per_group = kGroupUnits / cta_units;
    // Fits: every group has 32 KB of partial results.
    const int items = count * groups * ctas_per_group;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const int all_groups = item / ctas_per_group, unit = item % ctas_per_group * cta_units + warp / sharing;
      const SplitRequest split = shared.requests[all_groups / groups];
      const int kv_head = all_groups % groups / groups_per_head, group = all_groups % groups_per_head;
      const int64_t tile = kv_head * params.num_row_tiles + group / 4;
      const float* values = params.partial_out + tile * kPartialTile + group % 4 * kPartialGroup +
                            unit * kUnitBlocks * kPartialBlock + lane * 4;
      const float* lses = params.partial_lse + tile * kRowTile + group % 4 * 16 + lane / 4 * 2;
      if (!waited) {
        asm volatile("griddepcontrol.wait;" ::: "memory");
        waited = true;
      }
      Sum sum = accumulate(split, values, lses, partial_tiles, warp % sharing, sharing);
      if (join(shared, warp, lane, sharing, sum)) {
        const int row = group * 16 + lane / 4, column = unit * kUnitBlocks * 8;
        store_row<T>(params, split.request, kv_head, row, column, lane, sum, 0);
        store_row<T>(params, split.request, kv_head, row + 8, column, lane, sum, 1);
      }
    }
  }
  if (!waited) {  // what comes next in the stream takes this kernel's end for the end of the one before, too
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
}

}  // namespace

void launch_combine(const DenseDecodeParams& params, void* stream) {
  const auto kernel = params.element == Element::kBFloat16 ? combine_kernel<__nv_bfloat16> : combine_kernel<__half>;
  // No more requests can be split than there are, nor than there are cuts.
  const int64_t groups = static_cast<int64_t>(params.h_kv) * ceil_div(params.s_q * params.group, 16);
  const int64_t requests = params.schedule == nullptr    ? params.num_requests
                           : params.b < params.num_parts ? params.b
                                                         : params.num_parts;
  const int64_t full = static_cast<int64_t>(kCtasPerSm) * params.num_sms, items = requests * groups * kGroupUnits;
  device::launch_dependent("combine", kernel, static_cast<unsigned>(items < full ? items : full), kThreads, 0, stream,
                           params);
}

}  // namespace flash_mla
