// Joins the partial results of requests that the schedule split: out = sum_i 2^(lse_i - m) out_i / sum_i 2^(lse_i - m),
// in the order of the splits, so that the bits do not depend on which part came last. A row of a partial result without
// a key has lse -inf and zeros, which are read and count for nothing.
//
// Every CTA lists the split requests of the schedule, then takes work in turn. A strip of work is one warp wide: 32
// columns of a group of 16 rows, of which each lane has two rows and four pairs of columns, as the accumulators of the
// decode kernel had them. So a lane's weights serve 16 values, and loads are runs of 512 bytes. Where there are fewer
// strips than warps, several warps of a CTA share a strip's splits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "any/kernels.h"
#include "device/copy.cuh"
#include "device/launch.h"
#include "device/numeric.cuh"

namespace flash_mla {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kStripBlocks = 4;                              // of 8 columns
constexpr int kGroupStrips = kPartialBlocks / kStripBlocks;  // strips of a group of 16 rows
constexpr int kCtasPerSm = 2;
// Partial results in flight per warp: what registers hold.
template <bool kHalf>
constexpr int kUnroll = kHalf ? 5 : 4;
constexpr int kEarlyBatches = 3;   // of these, that a CTA which waits reads sooner than one that starts late
constexpr int kListed = kThreads;  // candidates per round of listing

// The batch-invariant mode sums in an order that depends on the request alone.
constexpr int kFixedSharingLog2 = 2;

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
  float4 value[kStripBlocks] = {};  // (row 0, column 0), (0, 1), (1, 0), (1, 1)
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
  // A partial result: `other` times `scale`. Its log-sum-exp `lse` is not above `largest`.
  __device__ __forceinline__ void add(const float4 (&other)[kStripBlocks], const float (&lse)[2],
                                      const float (&scale)[2]) {
    float x = device::exp2_approx(lse[0] - largest[0]), y = device::exp2_approx(lse[1] - largest[1]);
    weight[0] += x;
    weight[1] += y;
    x *= scale[0];
    y *= scale[1];
#pragma unroll
    for (int b = 0; b < kStripBlocks; ++b) {
      value[b] = make_float4(fmaf(x, other[b].x, value[b].x), fmaf(x, other[b].y, value[b].y),
                             fmaf(y, other[b].z, value[b].z), fmaf(y, other[b].w, value[b].w));
    }
  }
};

// Where a row goes.
struct RowOut {
  int64_t out, lse;  // elements
  float sink;        // base 2
  bool exists;
};

struct Shared {
  SplitRequest requests[kListed];
  int warp_counts[kWarps], warp_most[kWarps], warp_working[kWarps];
  Sum sums[kWarps][32];
  RowOut rows[kWarps][16];  // of a warp's strip
};

// The parameters of both kinds of kernels have partial results in common: [partials, units, tiles of 64 rows]. They
// differ in what a unit is, and in where its rows and its length stand.

__host__ __device__ int num_units(const DenseDecodeParams& params) { return params.h_kv; }
__host__ __device__ int num_units(const SparseAttentionParams& params) { return params.num_units; }

__host__ __device__ int unit_rows(const DenseDecodeParams& params) { return params.s_q * params.group; }
__host__ __device__ int unit_rows(const SparseAttentionParams& params) { return params.unit_rows; }

__host__ __device__ int unit_tiles(const DenseDecodeParams& params) { return params.num_row_tiles; }
__host__ __device__ int unit_tiles(const SparseAttentionParams& params) { return params.unit_tiles; }

__host__ __device__ int num_requests(const DenseDecodeParams& params) { return params.b; }
__host__ __device__ int num_requests(const SparseAttentionParams& params) { return params.num_requests_total; }

// Blocks that fixed cuts divide.
__device__ int request_blocks(const DenseDecodeParams& params, int request) {
  return max(ceil_div(min(max(params.cache_seqlens[request], 0), params.max_pages * params.page), kScheduleBlock), 1);
}

__device__ int request_blocks(const SparseAttentionParams& params, int request) {
  const int batch = request / params.tokens_per_batch, token = request - batch * params.tokens_per_batch;
  auto length = [&](const KeySource& keys) {
    return keys.lengths == nullptr
               ? keys.topk
               : min(max(keys.lengths[batch * keys.stride_lengths_b + token * keys.stride_lengths_s], 0), keys.topk);
  };
  return unit_blocks(length(params.keys[0]), length(params.keys[1]));
}

// Fixed cuts that depend on the call, not on the request alone.
__host__ __device__ bool is_evenly_cut(const DenseDecodeParams&) { return false; }
__host__ __device__ bool is_evenly_cut(const SparseAttentionParams& params) { return params.cut_evenly; }

__device__ int even_cuts_of(const DenseDecodeParams&, int) { return 1; }
__device__ int even_cuts_of(const SparseAttentionParams& params, int blocks) {
  return even_cuts(blocks, params.max_cuts, params.min_cut_blocks);
}

struct RowPlace {
  int batch, token, head;
};

__device__ __forceinline__ RowPlace place_of_row(const DenseDecodeParams& params, int request, int unit, int row) {
  const int token = row / params.group;
  return {request, token, unit * params.group + row - token * params.group};
}

__device__ __forceinline__ RowPlace place_of_row(const SparseAttentionParams& params, int request, int unit, int row) {
  const int batch = params.by_tokens_per_batch.divide(request), of_unit = params.by_h_q.divide(row);
  // Several units are one token each; a unit of several tokens is the only one.
  return {batch, request - batch * params.tokens_per_batch + unit + of_unit, row - of_unit * params.h_q};
}

__device__ __forceinline__ float lse_unit(const DenseDecodeParams&) { return device::kLn2; }
__device__ __forceinline__ float lse_unit(const SparseAttentionParams& params) {
  return params.lse_base2 ? 1.0f : device::kLn2;
}

// The request that is split and begins in this part (fixed cuts: with this index).
template <class Params>
__device__ bool split_request(const Params& params, int index, SplitRequest& found) {
  if (params.schedule == nullptr) {
    const int request = params.first_request + index;
    const int blocks = request_blocks(params, request);
    if (is_evenly_cut(params)) {
      const int cuts = even_cuts_of(params, blocks);
      found = {request, cuts, index * params.max_cuts, index * params.max_cuts + 1, 1};
      return cuts > 1;
    }
    const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
    found = {request, ceil_div(blocks, cut_blocks), index * params.max_cuts, index * params.max_cuts + 1, 1};
    return cut_blocks < blocks;
  }
  const ScheduleRow& row = params.schedule[index];
  const int begin_request = row.begin_request, begin_block = row.begin_block, request = row.end_request;
  const int next_begin_request = index + 1 < params.num_parts ? params.schedule[index + 1].begin_request : -1;
  const bool only = begin_request == request;
  if (begin_request >= num_requests(params) || next_begin_request != request || (only && begin_block > 0)) {
    return false;  // without work, not split, or begun in an earlier part
  }
  const int num_splits = min(params.num_splits[request + 1] - params.num_splits[request], params.num_parts - index);
  found = {request, num_splits, kPartialsPerPart * index + (only ? 0 : 1), kPartialsPerPart * (index + 1),
           kPartialsPerPart};
  return true;
}

template <class Params>
__device__ bool has_work(const Params& params, int index) {
  return params.schedule == nullptr || params.schedule[index].begin_request < num_requests(params);
}

// Lists the split requests from `base` on, in order, one candidate a thread: on an SM that the decode kernel has just
// left this is time that the whole call takes longer.
template <class Params>
__device__ void list_split_requests(const Params& params, Shared& shared, int base, int num_candidates) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, at = base + static_cast<int>(threadIdx.x);
  SplitRequest found;
  const bool is = at < num_candidates && split_request(params, at, found);
  const int working = __popc(__ballot_sync(~0u, at < num_candidates && has_work(params, at)));
  const unsigned votes = __ballot_sync(~0u, is);
  const int most = __reduce_max_sync(~0u, is ? found.num_splits : 0);
  __syncthreads();  // the list of the round before has been read
  if (lane == 0) {
    shared.warp_counts[warp] = __popc(votes);
    shared.warp_most[warp] = most;
    shared.warp_working[warp] = working;
  }
  __syncthreads();
  int before = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? shared.warp_counts[w] : 0;
  }
  if (is) {
    shared.requests[before + __popc(votes & ((1u << lane) - 1))] = found;
  }
  __syncthreads();
}

// Exact below 2^20. Groups are fewer: each has 64 KB of partial results.
__device__ __forceinline__ int divide(int n, int by) {
  return __float2int_rd(__fdividef(static_cast<float>(n) + 0.5f, static_cast<float>(by)));
}

// The logarithm of how many warps share a strip: as many as there are for all strips at once.
__device__ int choose_sharing(int num_strips, int most_splits, int most_ctas) {
  int sharing = 0;
  while (1 << sharing < kWarps && 2 << sharing <= most_splits && num_strips / kWarps * (2 << sharing) <= most_ctas) {
    ++sharing;
  }
  return sharing;
}

__device__ __forceinline__ int partial_of(const SplitRequest& split, int at) {
  return at == 0 ? split.first_partial : split.second_partial + (at - 1) * split.stride_partial;
}

// A lane's share of a strip in partial result 0.
struct Share {
  int64_t values;  // in elements
  const float *scales, *lses;
};

// The lane's values of a partial result: of several blocks, as they are in memory.
template <bool kHalf>
struct LaneValues {
  static constexpr int kWords = kStripBlocks * 4 / (kHalf ? 2 : 1), kUnits = kWords / 4;  // of 16 bytes
  static constexpr int kUnitStride = kPartialBlock * (kHalf ? 2 : 1);                     // elements
  using Element = std::conditional_t<kHalf, __half, float>;
  uint4 units[kUnits];

  // Zeros where it does not exist. With one condition for all units ptxas spills floats on SM100.
  __device__ __forceinline__ void load(const void* partial_out, int64_t at, bool exists) {
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      units[i] = make_uint4(0, 0, 0, 0);
      if (exists) {
        units[i] = *reinterpret_cast<const uint4*>(static_cast<const Element*>(partial_out) + at + i * kUnitStride);
      }
    }
  }

  __device__ __forceinline__ void widen(float4 (&values)[kStripBlocks]) const {
#pragma unroll
    for (int b = 0; b < kStripBlocks; ++b) {
      if constexpr (kHalf) {
        const uint4& unit = units[b / 2];
        const float2 rows[2] = {device::unpack2<__half>(b % 2 ? unit.z : unit.x),
                                device::unpack2<__half>(b % 2 ? unit.w : unit.y)};
        values[b] = make_float4(rows[0].x, rows[0].y, rows[1].x, rows[1].y);
      } else {
        values[b] = make_float4(__uint_as_float(units[b].x), __uint_as_float(units[b].y), __uint_as_float(units[b].z),
                                __uint_as_float(units[b].w));
      }
    }
  }
};

// What splits first, first + step, ... make.
template <bool kHalf>
__device__ __forceinline__ Sum accumulate(const SplitRequest& split, const void* partial_out, const Share& share,
                                          int partial_tiles, int first, int step) {
  Sum sum;
  auto tile_of = [&](int at) { return static_cast<int64_t>(partial_of(split, at) * partial_tiles); };
#pragma unroll 1
  for (int i = first; i == first || i < split.num_splits; i += kUnroll<kHalf> * step) {
    float lse[kUnroll<kHalf>][2], scale[kUnroll<kHalf>][2];
    LaneValues<kHalf> value[kUnroll<kHalf>];
#pragma unroll
    for (int u = 0; u < kUnroll<kHalf>; ++u) {
      const int at = i + u * step;
      value[u].load(partial_out, share.values + tile_of(at) * kPartialTile, at < split.num_splits);
    }
    // After the values, of which there are many more: what waits for these waits for all.
#pragma unroll
    for (int u = 0; u < kUnroll<kHalf>; ++u) {
      const int at = i + u * step;
      lse[u][0] = lse[u][1] = -INFINITY;
      scale[u][0] = scale[u][1] = 1;
      if (at < split.num_splits) {
        const float2 pair = *reinterpret_cast<const float2*>(share.lses + tile_of(at) * kRowTile);
        lse[u][0] = pair.x;
        lse[u][1] = pair.y;
        if constexpr (kHalf) {
          const float2 scales = *reinterpret_cast<const float2*>(share.scales + tile_of(at) * kPartialScales);
          scale[u][0] = scales.x;
          scale[u][1] = scales.y;
        }
      }
    }
    float largest[2] = {sum.largest[0], sum.largest[1]};
#pragma unroll
    for (int u = 0; u < kUnroll<kHalf>; ++u) {
      largest[0] = fmaxf(largest[0], lse[u][0]);
      largest[1] = fmaxf(largest[1], lse[u][1]);
    }
    sum.rescale(largest[0], largest[1]);
#pragma unroll
    for (int u = 0; u < kUnroll<kHalf>; ++u) {
      float4 values[kStripBlocks];
      value[u].widen(values);
      sum.add(values, lse[u], scale[u]);
    }
  }
  return sum;
}

// What `accumulate` has read for this warp, which nobody reads again. `strip`: where it begins in partial result 0. L2
// would else write it to memory while the next call reads its keys.
template <class Element>
__device__ __forceinline__ void discard(const SplitRequest& split, const Element* strip, int partial_tiles, int first,
                                        int step, int lane) {
  constexpr int kLine = 128 / sizeof(Element), kLines = kStripBlocks * kPartialBlock / kLine;
  static_assert(32 % kLines == 0);
  __syncwarp();  // all lanes have read
#pragma unroll 1
  for (int at = first + lane / kLines * step; at < split.num_splits; at += 32 / kLines * step) {
    const int64_t tile = partial_of(split, at) * partial_tiles;
    device::discard_line(strip + tile * kPartialTile + lane % kLines * kLine);
  }
}

// A lane's share of a row of a strip.
struct RowSum {
  float2 value[kStripBlocks] = {};
  float weight = 0, largest = kNoKey;
};

__device__ __forceinline__ RowSum row_of(const Sum& sum, int r) {
  RowSum row;
#pragma unroll
  for (int b = 0; b < kStripBlocks; ++b) {
    row.value[b] = r == 0 ? make_float2(sum.value[b].x, sum.value[b].y) : make_float2(sum.value[b].z, sum.value[b].w);
  }
  row.weight = r == 0 ? sum.weight[0] : sum.weight[1];
  row.largest = r == 0 ? sum.largest[0] : sum.largest[1];
  return row;
}

// The row's sums of the warps that share a strip, the first of which is `first`.
__device__ __forceinline__ RowSum join(const Shared& shared, int first, int sharing, int lane, int r) {
  RowSum row;
#pragma unroll 1
  for (int w = 0; w < sharing; ++w) {
    row.largest = fmaxf(row.largest, shared.sums[first + w][lane].largest[r]);
  }
#pragma unroll 1
  for (int w = 0; w < sharing; ++w) {
    const Sum& other = shared.sums[first + w][lane];
    const float factor = device::exp2_approx(other.largest[r] - row.largest);
    row.weight = fmaf(factor, other.weight[r], row.weight);
#pragma unroll
    for (int b = 0; b < kStripBlocks; ++b) {
      const float2 value = reinterpret_cast<const float2*>(&other.value[b])[r];
      row.value[b] = make_float2(fmaf(factor, value.x, row.value[b].x), fmaf(factor, value.y, row.value[b].y));
    }
  }
  return row;
}

template <class Params>
__device__ __forceinline__ RowOut find_row(const Params& params, int request, int unit, int row) {
  RowOut found{};
  found.exists = row < unit_rows(params);
  if (found.exists) {
    const auto [batch, token, head] = place_of_row(params, request, unit, row);
    found.out = batch * params.stride_out_b + token * params.stride_out_s + head * params.stride_out_h;
    found.lse = batch * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s;
    found.sink = params.attn_sink != nullptr ? params.attn_sink[head] * device::kLog2E : -INFINITY;
  }
  return found;
}

// The lane's share of a row, 8 of 32 columns after a transposition.
template <class T, class Params>
__device__ __forceinline__ void store_row(const Params& params, const RowOut& to, bool rehearses, int column, int lane,
                                          const RowSum& sum) {
  const bool any_key = sum.weight != 0;
  const float scale = any_key ? __fdividef(1.0f, sum.weight + device::exp2_approx(to.sink - sum.largest)) : 0.0f;
  uint32_t words[kStripBlocks];
#pragma unroll
  for (int b = 0; b < kStripBlocks; ++b) {
    words[b] = device::pack2<T>(sum.value[b].x * scale, sum.value[b].y * scale);
  }
  device::transpose_quad(words, lane);
  if (to.exists && !rehearses) {
    *reinterpret_cast<uint4*>(static_cast<T*>(params.out) + to.out + column + lane % 4 * 8) =
        make_uint4(words[0], words[1], words[2], words[3]);
    if (column == 0 && lane % 4 == 0) {
      params.lse[to.lse] = any_key ? (sum.largest + log2f(sum.weight)) * lse_unit(params) : INFINITY;
    }
  }
}

template <class T, bool kHalf, class Params>
__global__ void __launch_bounds__(kThreads, kCtasPerSm) combine_kernel(const __grid_constant__ Params params) {
  __shared__ Shared shared;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int groups_per_unit = ceil_div(unit_rows(params), 16), groups = groups_per_unit * num_units(params);
  const int partial_tiles = num_units(params) * unit_tiles(params);
  const int num_candidates = params.schedule == nullptr ? params.num_requests : params.num_parts;
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");

  // The schedule and the lengths are older than the kernel that wrote the partial results and started this one: what
  // follows from them is done while that one still runs.
  bool waited = false;
  for (int base = 0; base < num_candidates; base += kListed) {
    list_split_requests(params, shared, base, num_candidates);
    int count = 0, most_splits = 0, working = 0;
    for (int w = 0; w < kWarps; ++w) {
      count += shared.warp_counts[w];
      most_splits = max(most_splits, shared.warp_most[w]);
      working += shared.warp_working[w];
    }
    // CTAs on SMs that the kernel before this one has left idle wait for it, others start when it ends. So it pays to
    // have no more CTAs than those, if their warps need one batch of loads each.
    const int busy = is_evenly_cut(params) ? params.num_parts : working;
    const int grid = static_cast<int>(gridDim.x), early = kCtasPerSm * (params.num_sms - busy * partial_tiles);
    const int strips = count * groups * kGroupStrips;
    int sharing_log2 = kFixedSharingLog2;
    if (params.schedule != nullptr || is_evenly_cut(params)) {
      sharing_log2 = choose_sharing(strips, most_splits, min(early, grid));
      if (strips / kWarps > early || most_splits > kEarlyBatches * kUnroll<kHalf> << sharing_log2) {
        sharing_log2 = choose_sharing(strips, most_splits, grid);
      }
    }
    const int sharing = 1 << sharing_log2;
    // Fits: every group has 32 KB of partial results.
    const int items = (strips << sharing_log2) / kWarps;
    // Those that wait rehearse their first item meanwhile: that fetches the instructions.
    bool rehearses = !waited && items <= early;
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
      const int all_strips = (item * kWarps + warp) >> sharing_log2;
      const int all_groups = all_strips / kGroupStrips, strip = all_strips % kGroupStrips;
      const int index = divide(all_groups, groups), of_request = all_groups - index * groups;
      const int unit = divide(of_request, groups_per_unit), group = of_request - unit * groups_per_unit;
      const SplitRequest& listed = shared.requests[index];
      const int64_t tile = unit * unit_tiles(params) + group / 4;
      const int64_t begin = tile * kPartialTile + group % 4 * kPartialGroup + strip * kStripBlocks * kPartialBlock;
      const Share share{
          begin + lane * (kHalf ? 8 : 4),
          kHalf ? params.partial_scale + partial_scale_offset(tile, group % 4, 2 * strip / kGroupStrips) + lane * 2
                : nullptr,
          params.partial_lse + tile * kRowTile + group % 4 * 16 + lane / 4 * 2};
      const int column = strip * kStripBlocks * 8;
      __syncwarp();  // the rows of the strip before have been read
      if (lane < 16) {
        shared.rows[warp][lane] = find_row(params, listed.request, unit, group * 16 + lane);
      }
      __syncwarp();
      const int member = warp & (sharing - 1);
      bool again;
#pragma unroll 1
      do {
        if (!waited && !rehearses) {
          asm volatile("griddepcontrol.wait;" ::: "memory");
          waited = true;
        }
        SplitRequest split = listed;
        if (rehearses) {
          split.num_splits = 0;
        }
        const Sum sum = accumulate<kHalf>(split, params.partial_out, share, partial_tiles, member, sharing);
        if (sharing > 1) {
          __syncthreads();  // the sums of the strip before have been read
          shared.sums[warp][lane] = sum;
          __syncthreads();
        }
        // Of warps that share a strip the first two have a row of the lane's each.
#pragma unroll 1
        for (int r = member; r < 2; r += sharing) {
          store_row<T>(params, shared.rows[warp][lane / 4 + 8 * r], rehearses, column, lane,
                       sharing > 1 ? join(shared, warp - member, sharing, lane, r) : row_of(sum, r));
        }
        if (!rehearses) {
          using Element = typename LaneValues<kHalf>::Element;
          discard(listed, static_cast<const Element*>(params.partial_out) + begin, partial_tiles, member, sharing,
                  lane);
        }
        again = rehearses;
        rehearses = false;
      } while (again);
    }
  }
  // What comes next in the stream takes this kernel's end for the end of the one before, too; one CTA is enough for
  // that, and the others leave their SMs to what comes next.
  if (!waited && blockIdx.x == 0) {
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
}

template <class T, bool kHalf, class Params>
void launch_kind(const Params& params, void* stream) {
  // No more requests can be split than there are, nor than there are cuts.
  const int64_t groups = static_cast<int64_t>(num_units(params)) * ceil_div(unit_rows(params), 16);
  const int64_t requests = params.schedule == nullptr                ? params.num_requests
                           : num_requests(params) < params.num_parts ? num_requests(params)
                                                                     : params.num_parts;
  const int64_t items = requests * groups * kGroupStrips;
  // Where a group is all there is of a request, half of the SMs take a strip for each warp about as fast, and the next
  // decode kernel begins on the others meanwhile.
  const bool leaves_sms = std::is_same_v<Params, DenseDecodeParams> && groups == 1 && items <= kWarps * params.num_sms;
  const int64_t full = static_cast<int64_t>(leaves_sms ? 1 : kCtasPerSm) * params.num_sms;
  device::launch_dependent("combine", combine_kernel<T, kHalf, Params>,
                           static_cast<unsigned>(items < full ? items : full), kThreads, 0, stream, params);
}

template <class T, class Params>
void launch(const Params& params, void* stream) {
  params.partial_scale != nullptr ? launch_kind<T, true>(params, stream) : launch_kind<T, false>(params, stream);
}

}  // namespace

void launch_combine(const DenseDecodeParams& params, void* stream) {
  params.element == Element::kBFloat16 ? launch<__nv_bfloat16>(params, stream) : launch<__half>(params, stream);
}

void launch_combine(const SparseAttentionParams& params, void* stream) {
  SparseAttentionParams with_divisors = params;
  with_divisors.by_tokens_per_batch = make_divisor(params.tokens_per_batch);
  with_divisors.by_h_q = make_divisor(params.h_q);
  launch<__nv_bfloat16>(with_divisors, stream);
}

}  // namespace flash_mla
