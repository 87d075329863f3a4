// The pieces of work of one CTA: for each item (a part of the schedule, a unit, a tile of its rows) and each request of
// the part a run of key tiles.
#pragma once

#include <climits>

#include "core/params/sparse_attention.h"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// How many entries of a source's list count for a unit.
__device__ __forceinline__ int clamped_length(const SparseAttentionParams& params, const KeySource& source, int request,
                                              int unit) {
  if (source.lengths == nullptr) {
    return source.topk;
  }
  const bool flat = params.tokens_per_batch > 1;
  const int batch = flat ? request / params.tokens_per_batch : request,
            token = flat ? request % params.tokens_per_batch : unit;
  const int length = source.lengths[batch * source.stride_lengths_b + token * source.stride_lengths_s];
  return min(max(length, 0), source.topk);
}

// Row tiles go in items of so many; a unit's last item may have fewer.
template <int kItemTiles>
__device__ __forceinline__ int unit_items(const SparseAttentionParams& params) {
  return ceil_div(params.unit_tiles, kItemTiles);
}

__device__ __forceinline__ bool has_request(const SparseAttentionParams& params, const Walk& walk) {
  return walk.request <= walk.end_request && walk.request < params.num_requests_total;
}

// The lengths of the next piece, ahead of time.
template <int kItemTiles>
__device__ __forceinline__ void load_lengths(const SparseAttentionParams& params, Walk& walk) {
  if (has_request(params, walk)) {
    const int items = unit_items<kItemTiles>(params);
    const int unit = walk.item % (params.num_units * items) / items;
    walk.next_length[0] = clamped_length(params, params.keys[0], walk.request, unit);
    walk.next_length[1] = clamped_length(params, params.keys[1], walk.request, unit);
  }
}

template <int kItemTiles>
__device__ __forceinline__ void begin_item(const SparseAttentionParams& params, Walk& walk) {
  const int part = walk.item / (params.num_units * unit_items<kItemTiles>(params));
  if (params.schedule == nullptr) {
    walk.request = walk.end_request = params.first_request + part / params.max_cuts;
  } else {
    walk.request = params.schedule[part].begin_request;
    walk.end_request = params.schedule[part].end_request;
  }
  load_lengths<kItemTiles>(params, walk);
}

// An item is computed by a CTA, or by a cluster of as many as it has tiles.
template <int kItemTiles>
__device__ __forceinline__ void begin_walk(const SparseAttentionParams& params, Walk& walk) {
  walk.item = blockIdx.x / kItemTiles;
  walk.num_pieces = walk.run.num_tiles = walk.second_tiles = 0;
  begin_item<kItemTiles>(params, walk);
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

// Where the list of a piece's unit begins.
__device__ __forceinline__ const int32_t* list_of(const SparseAttentionParams& params, const PieceFacts& piece,
                                                  int source) {
  const KeySource& keys = params.keys[source];
  const int batch = piece.request / params.tokens_per_batch,
            token = piece.request % params.tokens_per_batch + piece.unit;
  return keys.indices + batch * keys.stride_indices_b + token * keys.stride_indices_s;
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
  const int items = unit_items<kItemTiles>(params), part_items = params.num_units * items;
  for (;; walk.request = INT_MAX) {
    while (!has_request(params, walk)) {
      walk.item += gridDim.x / kItemTiles;
      if (walk.item >= params.num_parts * part_items) {
        return false;
      }
      begin_item<kItemTiles>(params, walk);
    }
    const int part = walk.item / part_items, request = walk.request;
    const int length0 = walk.next_length[0], length1 = walk.next_length[1];
    const int blocks0 = max(ceil_div(length0, kScheduleBlock), 1);
    const int blocks = blocks0 + ceil_div(length1, kScheduleBlock);
    int begin = 0, end = INT_MAX, partial = -1;
    if (params.schedule == nullptr) {
      const int cut_blocks = fixed_cut_blocks(blocks, params.max_cuts);
      begin = part % params.max_cuts * cut_blocks;
      end = begin + cut_blocks;
      partial = cut_blocks < blocks ? part : -1;
      if (begin >= blocks) {
        continue;
      }
    } else {
      const ScheduleRow& row = params.schedule[part];
      const bool first = request == row.begin_request;
      const bool continues = request == walk.end_request && part + 1 < params.num_parts &&
                             params.schedule[part + 1].begin_request == request;
      begin = first ? row.begin_block : 0;
      end = continues ? row.end_block : INT_MAX;
      partial = begin == 0 && !continues ? -1 : kPartialsPerPart * part + (first ? 0 : 1);
    }
    // The block that stands for an empty first list is not computed.
    begin = length0 == 0 ? max(begin, 1) : begin;
    end = max(min(end, blocks), begin);
    PieceFacts& piece = walk.pending[walk.num_pieces % 4];
    piece = {end - begin,       request, walk.item % part_items / items,
             walk.item % items, partial, length0 - (params.s_q - 1) - begin * kScheduleBlock};
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
    load_lengths<kItemTiles>(params, walk);
    return true;
  }
}

}  // namespace flash_mla::inline device
