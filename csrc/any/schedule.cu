// The split-KV plan, made on the device by one CTA: any number of requests, no word from the host.
//
// The requests lie one after another on a line; a request is as long as its blocks plus a fixed overhead for a piece's
// set-up and epilogue. Part p begins at p / num_parts of the line. Two plans are weighed. The even plan cuts there, but
// moves a cut near a request's edge to that edge where a piece of a few blocks does not pay for itself (`snap_blocks`),
// and one within a piece's overhead in any case. The whole plan moves every cut to the nearest edge: nothing is split,
// nothing needs combining. The whole plan is taken when its longest part is no longer than the even plan's parts with
// what their cuts cost. Where requests are few and short a third one is weighed, since a block more or less in the
// longest part then is much of the call: each request in pieces of its own, as short as the parts suffice for.
#include <cuda_runtime.h>

#include "any/kernels.h"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kThreads = kMaxPlannedParts;
constexpr int kWarps = kThreads / 32;

// In blocks; where pieces are longer than this, one that is a block longer than another does not matter.
constexpr int kLongPiece = 16;

struct Cut {
  int request, block;
  __device__ bool same_as(const Cut& other) const { return request == other.request && block == other.block; }
};

struct Shared {
  int64_t warp_values[kWarps];
  Cut even[kThreads], whole[kThreads];
  int64_t whole_position[kThreads + 1];
  int cut_requests[kThreads];  // requests of the cuts inside requests, ascending
  int blocks[kThreads];        // of each request, where there are so few that it was worth finding them together
};

// Exclusive sum over the CTA's threads in order; `total` is the sum of all.
__device__ int64_t exclusive_sum(Shared& shared, int64_t value, int64_t& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t inclusive = value;
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(~0u, inclusive, step);
    inclusive += lane >= step ? below : 0;
  }
  __syncthreads();
  if (lane == 31) {
    shared.warp_values[warp] = inclusive;
  }
  __syncthreads();
  int64_t before = 0;
  total = 0;
  for (int w = 0; w < kWarps; ++w) {
    before += w < warp ? shared.warp_values[w] : 0;
    total += shared.warp_values[w];
  }
  return before + inclusive - value;
}

__device__ int64_t maximum(Shared& shared, int64_t value) {
  for (int step = 16; step > 0; step /= 2) {
    value = max(value, __shfl_xor_sync(~0u, value, step));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    shared.warp_values[threadIdx.x / 32] = value;
  }
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) {
    value = max(value, shared.warp_values[w]);
  }
  return value;
}

// The longest of a request's tokens first, first + step, ... A token without keys is as good as none.
__device__ int longest_of(const PlannedLengths& source, int request, int first, int step) {
  if (source.lengths == nullptr) {
    return source.most;
  }
  const int32_t* lengths = source.lengths + request * source.stride_b;
  int longest = 0;
  for (int token = first; token < source.tokens; token += step) {
    longest = max(longest, lengths[token * source.stride_s]);
  }
  return min(longest, source.most);
}

__device__ bool has_found_blocks(const PlanParams& params) {
  return params.b <= kThreads && max(params.lengths[0].tokens, params.lengths[1].tokens) > 1;
}

// A warp for each request: one thread would take long over many tokens.
__device__ void find_blocks(const PlanParams& params, Shared& shared) {
  const int lane = threadIdx.x % 32;
  for (int request = threadIdx.x / 32; request < params.b; request += kWarps) {
    const int first = __reduce_max_sync(~0u, longest_of(params.lengths[0], request, lane, 32)),
              second = __reduce_max_sync(~0u, longest_of(params.lengths[1], request, lane, 32));
    if (lane == 0) {
      shared.blocks[request] = unit_blocks(first, second);
    }
  }
  __syncthreads();
}

__device__ int request_blocks(const PlanParams& params, const Shared& shared, int request) {
  return has_found_blocks(params)
             ? shared.blocks[request]
             : unit_blocks(longest_of(params.lengths[0], request, 0, 1), longest_of(params.lengths[1], request, 0, 1));
}

// Everything in one row: only the last request's blocks are asked for, whose tokens may be very many.
__device__ void plan_one_part(const PlanParams& params, Shared& shared) {
  const int last = params.b - 1;
  int longest[2];
  for (int source = 0; source < 2; ++source) {
    longest[source] = static_cast<int>(
        maximum(shared, longest_of(params.lengths[source], last, static_cast<int>(threadIdx.x), kThreads)));
  }
  if (threadIdx.x == 0) {
    params.schedule[0] = {0, last, 0, unit_blocks(longest[0], longest[1]), 0, 0, 0, 0};
  }
  for (int r = threadIdx.x; r <= params.b; r += kThreads) {
    params.num_splits[r] = r;
  }
}

// The block at which a cut `offset` behind a request's start takes effect; num_blocks stands for the next request's
// start.
__device__ int snap(int64_t offset, int num_blocks, int tolerance) {
  const int64_t block = offset - kPieceOverhead;
  if (block <= min(tolerance, num_blocks / 2)) {
    return 0;
  }
  return block >= num_blocks - tolerance ? num_blocks : static_cast<int>(block);
}

// Both plans' cuts, each by the thread that owns the request in which it falls.
// Returns the line's length; `num_parts` becomes the number of parts that get work: short requests are not cut into
// more than pays.
__device__ int64_t place_cuts(const PlanParams& params, Shared& shared, int begin, int end, int& num_parts) {
  int64_t own = 0;
  for (int r = begin; r < end; ++r) {
    own += request_blocks(params, shared, r) + kPieceOverhead;
  }
  int64_t length = 0;
  int64_t position = exclusive_sum(shared, own, length);
  const int64_t blocks = length - static_cast<int64_t>(params.b) * kPieceOverhead;
  const int64_t useful = max(blocks / params.min_piece_blocks, static_cast<int64_t>(params.b));
  num_parts = static_cast<int>(min(useful, static_cast<int64_t>(params.num_parts)));
  const int tolerance = static_cast<int>(min(length / num_parts / 16, static_cast<int64_t>(params.snap_blocks)));
  auto cut_at = [&](int64_t part) { return length * part / num_parts; };
  for (int r = begin; r < end; ++r) {
    const int blocks = request_blocks(params, shared, r), extent = blocks + kPieceOverhead;
    int64_t part = ceil_div(position * num_parts, length);  // the first with its cut at or behind the request's start
    for (; part < num_parts && cut_at(part) < position + extent; ++part) {
      const int64_t offset = cut_at(part) - position;
      const int block = snap(offset, blocks, tolerance);
      shared.even[part] = block == blocks ? Cut{r + 1, 0} : Cut{r, block};
      const bool to_next = 2 * offset > extent;
      shared.whole[part] = {r + to_next, 0};
      shared.whole_position[part] = to_next ? position + extent : position;
    }
    position += extent;
  }
  if (threadIdx.x == 0) {
    shared.whole_position[num_parts] = length;
  }
  return length;
}

// How long pieces have to be at the most, so that requests of `blocks` blocks, one for each thread, can be cut into
// them without outnumbering the parts. 0: there are too many requests, or too much work. Where pieces of one block do
// not pay, nor do as many as this makes of pieces of two.
__device__ int shortest_pieces(const PlanParams& params, Shared& shared, int blocks, int64_t total) {
  if (2 * params.b > params.num_parts || total > static_cast<int64_t>(kLongPiece) * params.num_parts) {
    return 0;
  }
  const int least = 2 * params.min_piece_blocks - 1;
  auto sufficient = [&](int parts) { return max(ceil_div(static_cast<int>(total), parts), least); };
  int low = sufficient(params.num_parts), high = sufficient(params.num_parts - params.b);
  while (low < high) {
    const int middle = (low + high) / 2;
    int64_t pieces = 0;
    exclusive_sum(shared, ceil_div(blocks, middle), pieces);
    if (pieces <= params.num_parts) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// The cuts of such pieces, in `shared.even`. Returns how many there are.
__device__ int cut_into_pieces(Shared& shared, int blocks, int longest) {
  const int pieces = ceil_div(blocks, longest);
  int64_t total = 0;
  const int first = static_cast<int>(exclusive_sum(shared, pieces, total));
  for (int i = 0; i < pieces; ++i) {
    shared.even[first + i] = {static_cast<int>(threadIdx.x), blocks * i / pieces};
  }
  __syncthreads();
  return static_cast<int>(total);
}

__global__ void __launch_bounds__(kThreads) plan_kernel(const PlanParams params) {
  __shared__ Shared shared;
  asm volatile("griddepcontrol.wait;" ::: "memory");
  const int per_thread = ceil_div(params.b, kThreads), part = threadIdx.x;
  const int begin =
                static_cast<int>(min(static_cast<int64_t>(threadIdx.x) * per_thread, static_cast<int64_t>(params.b))),
            end = min(begin + per_thread, params.b);
  const bool has_row = part < params.num_parts;
  if (params.b == 0) {
    if (has_row) {
      params.schedule[part] = {};
    }
    if (part == 0) {
      params.num_splits[0] = 0;
    }
    return;
  }
  if (params.num_parts == 1) {
    plan_one_part(params, shared);
    return;
  }
  if (has_found_blocks(params)) {
    find_blocks(params, shared);
  }

  int num_parts = 0;
  const int64_t length = place_cuts(params, shared, begin, end, num_parts);
  bool has_part = part < num_parts;
  __syncthreads();
  const int64_t longest = maximum(shared, has_part ? shared.whole_position[part + 1] - shared.whole_position[part] : 0);
  const int64_t even =
      ceil_div(length + static_cast<int64_t>(num_parts - 1) * kPieceOverhead, static_cast<int64_t>(num_parts)) +
      kCombineOverhead;
  const int own_blocks = begin < end ? request_blocks(params, shared, begin) : 0;  // the only one, if they are few
  const int piece =
      shortest_pieces(params, shared, own_blocks, length - static_cast<int64_t>(params.b) * kPieceOverhead);
  const int64_t pieces = piece == 0 ? INT64_MAX : piece + kPieceOverhead + kCombineOverhead;
  const Cut* cuts = longest <= min(even, pieces) ? shared.whole : shared.even;
  if (cuts == shared.even && pieces <= even) {
    has_part = part < cut_into_pieces(shared, own_blocks, piece);
  }

  // Parts that begin where another one does have no work; the others close ranks.
  const Cut cut = has_part ? cuts[part] : Cut{params.b, 0};
  const bool works = cut.request < params.b && (part == 0 || !cut.same_as(cuts[part - 1]));
  const bool inside = works && cut.block > 0;
  int64_t totals = 0;
  const int64_t before =
      exclusive_sum(shared, static_cast<int64_t>(works) | static_cast<int64_t>(inside) << 32, totals);
  const int row_index = static_cast<int>(before & 0xffffffff), inside_before = static_cast<int>(before >> 32);
  const int num_working = static_cast<int>(totals & 0xffffffff), num_inside = static_cast<int>(totals >> 32);
  if (inside) {
    shared.cut_requests[inside_before] = cut.request;
  }
  __syncthreads();

  auto cuts_below = [&](int request) {  // cuts inside requests before this one
    int low = 0, high = num_inside;
    while (low < high) {
      const int middle = (low + high) / 2;
      (shared.cut_requests[middle] < request ? low : high) =
          shared.cut_requests[middle] < request ? middle + 1 : middle;
    }
    return low;
  };
  for (int r = begin; r < end; ++r) {
    params.num_splits[r] = r + cuts_below(r);
  }
  auto is_split = [&](int request) { return cuts_below(request + 1) > cuts_below(request); };
  if (works) {
    ScheduleRow& row = params.schedule[row_index];
    row.begin_request = cut.request;
    row.begin_block = cut.block;
    row.begin_split = inside ? inside_before - cuts_below(cut.request) + 1 : 0;
    row.first_request_is_split = is_split(cut.request);
    row.reserved = 0;
  }
  // The end of a row is the next one's beginning.
  auto finish_row = [&](int index, Cut next) {
    ScheduleRow& row = params.schedule[index];
    row.end_request = next.block > 0 ? next.request : next.request - 1;
    row.end_block = next.block > 0 ? next.block : request_blocks(params, shared, row.end_request);
    row.last_request_is_split = is_split(row.end_request);
  };
  if (works && row_index > 0) {
    finish_row(row_index - 1, cut);
  }
  if (threadIdx.x == 0) {
    finish_row(num_working - 1, {params.b, 0});
    params.num_splits[params.b] = params.b + num_inside;
  }
  if (has_row && part >= num_working) {
    params.schedule[part] = {params.b, 0, 0, 0, 0, 0, 0, 0};
  }
}

}  // namespace

void launch_plan(const PlanParams& params, void* stream) {
  device::launch_dependent("plan", plan_kernel, 1, kThreads, 0, stream, params);
}

}  // namespace flash_mla
