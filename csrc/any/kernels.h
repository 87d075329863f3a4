// Kernels for every architecture: planning, compacting of index lists, widening of queries, combining of split results,
// merging of attention states, KV caches.
#pragma once

#include <cstdint>

#include "core/params/dense_decode.h"
#include "core/params/dense_prefill.h"
#include "core/params/dense_prefill_backward.h"
#include "core/params/kv_cache.h"
#include "core/params/sparse_attention.h"
#include "core/params/sparse_prefill_backward.h"

namespace flash_mla {

// How many keys the requests have of one source: the longest of each request's tokens.
struct PlannedLengths {
  const int32_t* lengths;  // [b, tokens]; null: every request has `most`
  int64_t stride_b, stride_s;
  int tokens;  // 1 for lengths by request
  int most;    // longer ones are cut to it
};

constexpr int kSnapBlocks = 4;

struct PlanParams {
  PlannedLengths lengths[2];  // a request has unit_blocks(first, second) blocks
  ScheduleRow* schedule;      // [num_parts]
  int32_t* num_splits;        // [b + 1], cumulative
  int b;
  int num_parts;  // rows of the schedule
  // Shorter pieces cost more in partial results, written and read again, than their parallel work saves.
  int min_piece_blocks;
  // A cut this near to a request's edge, in blocks, moves to it: parts less even for a piece less to be joined.
  int snap_blocks;
};

void launch_plan(const PlanParams& params, void* stream);

// Fills `params.plan` and `params.planned`.
void launch_prefill_plan(const DensePrefillParams& params, void* stream);
void launch_prefill_backward_plan(const DensePrefillBackwardParams& params, void* stream);

// What the backward's kernel starts from: items, deltas, zeros in `dq_sum` and `turns`. Then, from the sums, dq.
void launch_prefill_backward_prepare(const DensePrefillBackwardParams& params, void* stream);
void launch_prefill_backward_finish(const DensePrefillBackwardParams& params, void* stream);

// The same for sparse prefill: rows, zeros in the sums, and units where they are in fixed point. Then, from the sums,
// dkv, and d_sink.
void launch_sparse_backward_prepare(const SparsePrefillBackwardParams& params, void* stream);
void launch_sparse_backward_finish(const SparsePrefillBackwardParams& params, void* stream);

// q [b, s_q, h_q, d_qk], of e4m3 values, as bfloat16, contiguous. Strides in values.
struct WidenQueryParams {
  const void* q;
  void* wide;
  int64_t num_rows;  // b * s_q * h_q
  int64_t stride_b, stride_s, stride_h;
  int s_q, h_q, d_qk;
  int num_sms;
};

void launch_widen_query(const WidenQueryParams& params, void* stream);

// Joins the partial results of split requests into `out` and `lse`.
void launch_combine(const DenseDecodeParams& params, void* stream);
void launch_combine(const SparseAttentionParams& params, void* stream);

// Of each token's lists the indices that count, before the length and of a slot, in their order and without gaps.
struct CompactParams {
  KeySource keys[2];      // topk 0: there is no such source
  int32_t* compacted[2];  // [num_tokens, topk]
  int32_t* lengths[2];    // [num_tokens]
  int s_q;                // token t is token t % s_q of request t / s_q
  int first_token, num_tokens;
  int num_sms;
};

void launch_compact(const CompactParams& params, void* stream);

constexpr int kMaxMergeParts = 16;

struct MergeParams {
  const void* outs[kMaxMergeParts];
  const float* lses[kMaxMergeParts];
  int64_t stride_out[kMaxMergeParts][3];  // batch, token, head; the last dimension is contiguous
  int64_t stride_lse[kMaxMergeParts][3];  // batch, token, head
  void* out;                              // contiguous [b, tokens, heads, d]
  float* lse;
  int64_t stride_merged_lse[3];
  int num_parts;
  int64_t num_rows;  // b * tokens * heads
  int tokens, heads, d;
  int element;  // 0 bf16, 1 fp16, 2 float32
};

void launch_merge(const MergeParams& params, void* stream);

// Rows into the slots of a cache, and all slots of a cache into rows.
void launch_append_kv_cache(const KVCacheParams& params, void* stream);
void launch_dequantize_kv_cache(const KVCacheParams& params, void* stream);

}  // namespace flash_mla
