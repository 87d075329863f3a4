// What the backward of sparse prefill is given. Strides are in elements.
#pragma once

#include <cstdint>

#include "core/params/sparse_attention.h"

namespace flash_mla {

// What a query token's head brings along besides its row of q and of the output's gradient.
struct alignas(16) BackwardRow {
  float log_sum;    // log2(e) * lse; +inf where no key is valid
  float share;      // of the keys, against the sink
  float offset;     // d_lse - share * delta, where delta is d_out . out
  float sink_term;  // of the sink's gradient
};

// What a row of the cache may be summed to at the most follows from these.
struct BackwardBounds {
  uint32_t q;        // bits of the largest magnitude in q
  uint32_t d_out;    // and in d_out
  uint32_t offset;   // and among the offsets of rows
  uint32_t padding;  // to 16 bytes
};

// A sum of terms in units stays below 2^62; a term that is not below it is none.
constexpr float kMostUnits = 0x1p62f;

// For sums that do not depend on their order: 64-bit integers in units of a power of two, one for each row of the
// cache.
struct FixedPointSums {
  int64_t* sums;           // [num_slots, d_qk]
  int32_t* counts;         // [num_slots]: how often a row is selected
  float* units_per_one;    // [num_slots]
  int32_t* overflows;      // [num_slots]: not 0 where a term was no number or beyond what the bounds say
  BackwardBounds* bounds;  // one
};

struct SparsePrefillBackwardParams {
  const void* q;      // bfloat16 [s_q, h_q, d_qk]
  KeySource keys;     // bfloat16
  const void* out;    // bfloat16 [s_q, h_q, 512]; out and lse are the forward's results
  const float* lse;   // [s_q, h_q]
  const void* d_out;  // bfloat16 [s_q, h_q, 512]
  const float* d_lse;
  const float* attn_sink;  // null: none
  void* dq;                // bfloat16; the gradients are contiguous
  void* dkv;               // bfloat16 [num_slots, d_qk]
  float* d_sink;           // null: none

  // Workspace.
  BackwardRow* rows;  // [s_q, h_q]
  float* sums;        // [num_slots, d_qk]; null: in fixed point
  FixedPointSums fixed;

  int64_t stride_q_s, stride_q_h;
  int64_t stride_out_s, stride_out_h;
  int64_t stride_lse_s, stride_lse_h;
  int64_t stride_do_s, stride_do_h;
  int64_t stride_dlse_s, stride_dlse_h;
  int s_q, h_q, d_qk;
  int head_blocks;  // of kRowTile heads
  int num_sms;
  float softmax_scale;
  float scale_log2;  // softmax_scale * log2(e)
  bool lse_base2;    // of lse and d_lse
};

}  // namespace flash_mla
