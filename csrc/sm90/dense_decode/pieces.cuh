// The pieces of work of one CTA: for each request of its part a run of key tiles. Every role walks the same sequence by
// itself.
#pragma once

#include "core/params/dense_decode.h"

namespace flash_mla::sm90::dense_decode {

struct Piece {
  int request;
  int begin_tile;
  int num_tiles;  // 0: nothing to read, but the output still has to be written
  int seqlen;
  int partial;  // index of the partial result, -1: the piece is the whole request
};

// The schedule may have been made for other lengths (a captured graph that is replayed later). Cuts between parts are
// taken from the schedule; the part that holds a request's last piece goes on to the request's present end. So every
// key is seen once whatever the lengths were.
//
// Little is kept between pieces: the math warpgroups have no registers to spare. The producers, for which they wait,
// load a row's fields `kAtOnce`: each load that waits for another costs a small call half a microsecond.
template <bool kAtOnce>
class Pieces {
 public:
  // `causal_cut`: keys at the end of a request that no row of this row tile sees.
  __device__ __forceinline__ Pieces(const DenseDecodeParams& params, int part, int causal_cut)
      : params_(params), part_(part), causal_cut_(causal_cut) {
    request_ = params.schedule == nullptr ? params.first_request + part / params.max_cuts
                                          : params.schedule[part].begin_request;
    next_seqlen_ = request_ < params.b ? params.cache_seqlens[request_] : 0;
  }

  // Where the next piece would begin: known before its length is.
  __device__ __forceinline__ int next_request() const { return request_; }
  __device__ __forceinline__ int next_begin() const {
    if (params_.schedule == nullptr) {
      return 0;
    }
    const ScheduleRow& row = params_.schedule[part_];
    return request_ == row.begin_request ? row.begin_block : 0;
  }

  __device__ __forceinline__ bool next(Piece& piece) {
    int begin = 0, end = INT_MAX, partial = -1, end_request = request_;
    if (params_.schedule == nullptr) {
      const int blocks = max(ceil_div(clamped_seqlen(), kScheduleBlock), 1);
      const int cut_blocks = fixed_cut_blocks(blocks, params_.max_cuts);
      begin = part_ % params_.max_cuts * cut_blocks;
      if (request_ >= params_.b || begin >= blocks) {
        return false;
      }
      end = begin + cut_blocks;
      partial = cut_blocks < blocks ? part_ : -1;
    } else {
      const ScheduleRow* row = params_.schedule + part_;
      if (!kAtOnce && request_ >= params_.b) {
        return false;
      }
      end_request = row->end_request;
      if (!kAtOnce && request_ > end_request) {
        return false;
      }
      int next_begin_request = -1;
      if (part_ + 1 < params_.num_parts && (kAtOnce || request_ == end_request)) {
        next_begin_request = row[1].begin_request;
      }
      const int begin_request = row->begin_request, begin_block = row->begin_block, end_block = row->end_block;
      if (kAtOnce && (request_ >= params_.b || request_ > end_request)) {
        return false;
      }
      const bool first = request_ == begin_request;
      const bool continues = request_ == end_request && next_begin_request == request_;
      begin = first ? begin_block : 0;
      end = continues ? end_block : INT_MAX;
      partial = begin == 0 && !continues ? -1 : kPartialsPerPart * part_ + (first ? 0 : 1);
    }
    const int seqlen = clamped_seqlen();
    const int visible = ceil_div(max(seqlen - causal_cut_, 0), kScheduleBlock);
    piece = {request_, begin, max(min(end, visible) - begin, 0), seqlen, partial};
    request_ = request_ < end_request ? request_ + 1 : INT_MAX;
    if (request_ < params_.b) {
      next_seqlen_ = params_.cache_seqlens[request_];
    }
    return true;
  }

 private:
  __device__ __forceinline__ int clamped_seqlen() const {
    return min(max(next_seqlen_, 0), params_.max_pages * params_.page);
  }

  const DenseDecodeParams& params_;
  const int part_, causal_cut_;
  int request_, next_seqlen_;
};

// The CTA's place in the grid: row tiles fastest, so that CTAs which read the same keys start together.
struct Place {
  int row_tile, kv_head, part;
  int causal_cut;

  // Volatile, so that each role computes it for itself: shared between the roles it would be spilled.
  __device__ __forceinline__ explicit Place(const DenseDecodeParams& params) {
    int tile;
    asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(tile));
    row_tile = tile % params.num_row_tiles;
    kv_head = tile / params.num_row_tiles % params.h_kv;
    part = tile / params.num_row_tiles / params.h_kv;
    const int last_row = min((row_tile + 1) * kRowTile, params.s_q * params.group) - 1;
    causal_cut = params.causal ? params.s_q - 1 - last_row / params.group : 0;
  }
};

}  // namespace flash_mla::sm90::dense_decode
