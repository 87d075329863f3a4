// What the kernels of sparse decode, sparse prefill and decode over FP8 caches are given; those of dense decode, too,
// on SM100.
//
// A request has units: sets of rows that attend to the same list of keys. With indices a unit is a query token and its
// rows are heads; over block tables a request is one unit and its rows are (token, head) pairs, token-major. A unit's
// rows are computed in tiles of 64.
#pragma once

#include <cstdint>

#include "core/divisor.h"
#include "core/kv_format.h"
#include "core/params/dense_decode.h"
#include "core/schedule.h"

namespace flash_mla {

// What a call asks for, as far as the choice of a kernel goes.
struct SparseAttentionProblem {
  int compute_capability;
  Element element;  // of q
  KVFormat format;
  KVFormat extra_format;  // kNone: no second cache
  bool from_table;        // keys by block table, not by indices
  int b, s_q, h_q, h_kv = 1, d_qk, d_v;
  int page, extra_page;
  int topk, extra_topk;
  float softmax_scale;
  bool few_tiles;  // so few row tiles that most SMs have none of their own: each CTA takes a small part of one
};

// A cache, and which of its rows the units attend to.
struct KeySource {
  const void* cache;                // null: there is no such source, and topk is 0
  const int32_t* indices;           // [b, s_q, topk], page * page_size + offset each; or a block table [b, max_pages]
  const int32_t* lengths;           // how many entries (of a table: keys) count; null: topk
  int64_t stride_page, stride_row;  // bytes
  int64_t stride_indices_b, stride_indices_s;
  int64_t stride_lengths_b, stride_lengths_s;  // stride_lengths_s is 0 for lengths [b]
  int topk;                                    // entries of a list; of a table: max_pages * page
  int page;
  int page_shift;      // log2(page), -1: not a power of two
  uint32_t num_slots;  // of the cache, at most 2^31: an index at or past it is not valid
};

struct SparseAttentionParams {
  const void* q;                // bfloat16 or, in dense decode, float16 [b, s_q, h_q, d_qk]
  KeySource keys[2];            // the keys of a unit are those of the first source, then those of the second
  const ScheduleRow* schedule;  // null: fixed cuts
  const int32_t* num_splits;
  const float* attn_sink;  // null: none
  const float* descale_q;  // formats of one scale: what q stands for times this; null: 1
  const float* descale_k;  // the same of the keys
  void* out;               // [b, s_q, h_q, 512], of q's type
  float* lse;              // [b, h_q, s_q] by its strides
  float* max_logits;       // null: not asked for; strides of lse
  void* partial_out;       // [partials, partial_units, tiles per unit, kPartialTile]; null: nothing can be split
  float* partial_scale;    // [partials, partial_units, tiles per unit, kPartialScales], as of dense decode
  float* partial_lse;      // [partials, partial_units, tiles per unit, kRowTile], as partial results of dense decode

  int64_t stride_q_b, stride_q_s, stride_q_h;
  int64_t stride_out_b, stride_out_s, stride_out_h;
  int64_t stride_lse_b, stride_lse_h, stride_lse_s;

  int b, s_q, h_q;
  // In a schedule, requests are those of the batch. With fixed cuts over indices each token is a request of its own, so
  // that its cuts depend on nothing else: then `tokens_per_batch` is s_q, request r is token r % s_q of r / s_q, and
  // num_units is 1. Otherwise tokens_per_batch is 1.
  int tokens_per_batch;
  int num_requests_total;  // b, or b * s_q
  int num_units;           // of a request
  int partial_units;       // of a request in the partial results: num_units, and those of other launches
  int unit_rows;           // h_q, or s_q * h_q over block tables
  int unit_tiles;          // ceil(unit_rows / 64)
  int num_sms;
  int num_parts;
  int max_cuts;       // fixed cuts: pieces per request at the most
  int first_request;  // fixed cuts: the launch serves requests from here on
  int num_requests;   // fixed cuts: and so many of them
  // Fixed cuts that depend on the call: even_cuts(blocks, max_cuts, min_cut_blocks) pieces of each list.
  bool cut_evenly;
  int min_cut_blocks;
  float scale_log2;  // softmax_scale * log2(e)
  bool from_table;
  bool causal;     // over block tables only
  bool lse_base2;  // lse in base 2

  // What the kernels divide by; `launch_kernel` fills them.
  Divisor by_tokens_per_batch, by_h_q;
  Divisor by_unit_items, by_part_items;  // items of a unit and of a part
};

// Blocks of a unit's list: those of the first source (at least one, so that a unit without keys has a part that writes
// its result), then those of the second. `length0` and `length1` are within 0 and topk.
constexpr int unit_blocks(int length0, int length1) {
  const int first = ceil_div(length0, kScheduleBlock);
  return (first < 1 ? 1 : first) + ceil_div(length1, kScheduleBlock);
}

}  // namespace flash_mla
