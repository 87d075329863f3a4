// The pieces of work of one CTA: for each item (a part of the schedule, a unit, a tile of its rows) and each request of
// the part a run of key tiles.
#pragma once

#include <climits>

#include "core/params/sparse_attention.h"
#include "device/copy.cuh"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// A request's token of a unit.
struct Token {
  int batch, token;
  __device__ __forceinline__ Token(const SparseAttentionParams& params, int request, int unit)
      : batch(params.by_tokens_per_batch.divide(request)), token(request - batch * params.tokens_per_batch + unit) {}
};

// How many entries of a source's list count for a unit.
__device__ __forceinline__ int clamped_length(const KeySource& source, const Token& at, bool guesses) {
  if (source.lengths == nullptr || guesses) {
    return source.topk;
  }
  const int length = source.lengths[at.batch * source.stride_lengths_b + at.token * source.stride_lengths_s];
  return min(max(length, 0), source.topk);
}

__device__ __forceinline__ bool has_request(const SparseAttentionParams& params, const Walk& walk) {
  return walk.request <= walk.end_request && walk.request < params.num_requests_total;
}

// The lengths of the next piece, ahead of time.
__device__ __forceinline__ void load_lengths(const SparseAttentionParams& params, Walk& walk) {
  if (has_request(params, walk)) {
    const Token at(params, walk.request, walk.unit);
    walk.next_length[0] = clamped_length(params.keys[0], at, walk.guesses);
    walk.next_length[1] = clamped_length(params.keys[1], at, walk.guesses);
  }
}

// Row tiles go in items; a unit's last item may have fewer.
__device__ __forceinline__ void begin_item(const SparseAttentionParams& params, Walk& walk) {
  const int part = params.by_part_items.divide(walk.item), of_part = walk.item - part * params.by_part_items.value;
  const int unit = params.by_unit_items.divide(of_part);
  walk.part = part;
  walk.unit = unit;
  walk.row_tile = of_part - unit * params.by_unit_items.value;
  if (params.schedule == nullptr) {
    walk.request = walk.end_request = params.first_request + part / params.max_cuts;
    return;
  }
  const ScheduleRow& row = params.schedule[part];
  const int next_request = part + 1 < params.num_parts ? params.schedule[part + 1].begin_request : -1;
  const int begin_request = row.begin_request, begin_block = row.begin_block, end_request = row.end_request,
            end_block = row.end_block;
  walk.request = walk.begin_request = begin_request;
  walk.begin_block = begin_block;
  walk.end_request = end_request;
  walk.end_block = next_request == end_request ? end_block : INT_MAX;
}

// An item is computed by a CTA, or by a cluster of as many as it has tiles.
template <int kItemTiles>
__device__ __forceinline__ void begin_walk(Walk& walk) {
  walk.item =
      static_cast<int>(blockIdx.x / kItemTiles) - static_cast<int>(gridDim.x / kItemTiles);  // and on from there
  walk.num_pieces = walk.run.num_tiles = walk.second_tiles = 0;
  walk.guesses = false;
  walk.request = INT_MAX;
}

// A tile, or a piece without any, in a few bits.
struct Entry {
  uint32_t bits;
  static constexpr uint32_t kExists = 1, kHasTile = 2, kBeginsPiece = 4, kSlot = 8, kSource = 16;
  static constexpr int kPieceShift = 5;
  __device__ __forceinline__ bool exists() const { return bits & kExists; }
  __device__ __forceinline__ bool has_tile() const { return bits & kHasTile; }
  __device__ __forceinline__ bool begins_piece() const { return bits & kBeginsPiece; }
  __device__ __forceinline__ int slot() const { return bits / kSlot & 1; }
  __device__ __forceinline__ int source() const { return bits / kSource & 1; }
  __device__ __forceinline__ int piece() const { return bits >> kPieceShift & 3; }
};

// Asks L2 for the lists and Q of a CTA's first piece, where lists are cut evenly: where they are is known before the
// kernels before this one have ended. What these still write goes through L2 as well.
template <class C>
__device__ __forceinline__ void prefetch_inputs(const SparseAttentionParams& params) {
  constexpr int kLineBytes = 128, kRowLines = C::kHeadDim * 2 / kLineBytes;
  const int item = static_cast<int>(blockIdx.x / C::kRanks), part = params.by_part_items.divide(item),
            row_tile = item - part * params.by_part_items.value, request = part / params.max_cuts;
  const Token at(params, params.first_request + request, 0);
  // The threads of all CTAs that have a piece of the list share the work.
  const int cta = (part - request * params.max_cuts) * C::kRanks + static_cast<int>(blockIdx.x % C::kRanks),
            thread = static_cast<int>(threadIdx.x) + cta * C::kMathThreads,
            threads = params.max_cuts * C::kRanks * C::kMathThreads;
#pragma unroll 1
  for (const KeySource& keys : params.keys) {
    const int32_t* list = keys.indices + at.batch * keys.stride_indices_b + at.token * keys.stride_indices_s;
    for (int i = thread * (kLineBytes / 4); i < keys.topk; i += threads * (kLineBytes / 4)) {
      prefetch_l2(list + i);
    }
  }
  const auto q =
      static_cast<const unsigned char*>(params.q) + 2 * (at.batch * params.stride_q_b + at.token * params.stride_q_s +
                                                         static_cast<int64_t>(row_tile) * C::kRows * params.stride_q_h);
  const int rows = min(params.unit_rows - row_tile * C::kRows, C::kRows);
  for (int i = thread; i < rows * kRowLines; i += threads) {
    prefetch_l2(q + i / kRowLines * params.stride_q_h * 2 + i % kRowLines * kLineBytes);
  }
}

// Where the list of a piece's unit begins.
__device__ __forceinline__ const int32_t* list_of(const SparseAttentionParams& params, const PieceFacts& piece,
                                                  int source) {
  const KeySource& keys = params.keys[source];
  const Token at(params, piece.request, piece.unit);
  return keys.indices + at.batch * keys.stride_indices_b + at.token * keys.stride_indices_s;
}

// Goes over to the piece's second source.
__device__ __forceinline__ void begin_second_run(const SparseAttentionParams& params, Walk& walk) {
  Run& run = walk.run;
  run.list = list_of(params, walk.pending[run.bits >> Entry::kPieceShift & 3], 1);
  run.position = walk.second_position;
  run.length = walk.second_length;
  run.num_tiles = walk.second_tiles;
  run.bits |= Entry::kSource;
  walk.second_tiles = 0;
}

// The next piece, or false where there is none.
//
// The schedule may have been made for other lengths (a captured graph that is replayed later). Cuts between parts are
// taken from the schedule; the part that holds a request's last piece goes on to the list's present end. So every key
// is seen once whatever the lengths were.
template <int kItemTiles>
__device__ __forceinline__ bool next_piece(const SparseAttentionParams& params, Walk& walk) {
  for (;; walk.request = INT_MAX) {
    while (!has_request(params, walk)) {
      walk.item += gridDim.x / kItemTiles;
      if (walk.item >= params.num_parts * params.by_part_items.value) {
        return false;
      }
      begin_item(params, walk);
      load_lengths(params, walk);
    }
    const int part = walk.part, request = walk.request, length0 = walk.next_length[0], length1 = walk.next_length[1];
    const int blocks0 = max(ceil_div(length0, kScheduleBlock), 1);
    const int blocks = blocks0 + ceil_div(length1, kScheduleBlock);
    int begin, end, partial;
    if (params.cut_evenly) {
      const int cuts = even_cuts(blocks, params.max_cuts, params.min_cut_blocks), cut = part % params.max_cuts;
      if (cut >= cuts) {
        continue;
      }
      begin = blocks * cut / cuts;
      end = blocks * (cut + 1) / cuts;
      partial = cuts > 1 ? part : -1;
    } else if (params.schedule == nullptr) {
      const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
      begin = part % params.max_cuts * cut_blocks;
      end = begin + cut_blocks;
      partial = cut_blocks < blocks ? part : -1;
      if (begin >= blocks) {
        continue;
      }
    } else {
      const bool first = request == walk.begin_request;
      begin = first ? walk.begin_block : 0;
      end = request == walk.end_request ? walk.end_block : INT_MAX;
      partial = begin == 0 && end == INT_MAX ? -1 : kPartialsPerPart * part + (first ? 0 : 1);
    }
    // The block that stands for an empty first list is not computed.
    begin = length0 == 0 ? max(begin, 1) : begin;
    end = max(min(end, blocks), begin);
    PieceFacts& piece = walk.pending[walk.num_pieces % 4];
    piece = {end - begin,   request, walk.unit,
             walk.row_tile, partial, length0 - (params.s_q - 1) - begin * kScheduleBlock};
    const int first_tiles = max(min(end, blocks0) - begin, 0);
    walk.second_tiles = end - begin - first_tiles;
    walk.second_position = max(begin - blocks0, 0) * kScheduleBlock;
    walk.second_length = length1;
    walk.run = {list_of(params, piece, 0), begin * kScheduleBlock, length0, first_tiles,
                Entry::kExists | Entry::kBeginsPiece | (end > begin ? Entry::kHasTile : 0) |
                    static_cast<uint32_t>(walk.num_pieces % 4) << Entry::kPieceShift};
    if (first_tiles == 0 && walk.second_tiles > 0) {
      begin_second_run(params, walk);
    }
    ++walk.num_pieces;
    ++walk.request;
    load_lengths(params, walk);
    return true;
  }
}

}  // namespace flash_mla::inline device
