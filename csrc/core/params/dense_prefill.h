// What dense prefill is given, and its plan: which tile of query rows of which head is computed in which order. Strides
// are in elements.
#pragma once

#include <cstdint>

#include "core/params/dense_decode.h"

namespace flash_mla {

constexpr int kPrefillHeadDimV = 128;

// Query rows of a work item, consecutive tokens of one sequence and head, in the kernels of a compute capability.
constexpr int prefill_row_tile(int compute_capability) { return compute_capability < 100 ? 128 : 256; }

// What a call asks for, as far as the choice of a kernel goes.
struct DensePrefillProblem {
  int compute_capability;
  Element element;
  int h_q, h_kv, d_qk, d_v;
  float softmax_scale;
};

// A sequence with queries, or in the backward one with keys. Running lengths come from the caller's tensors, which the
// host does not see: in a plan, whatever they were, sequences lie within the tensors and do not overlap, and every
// query token, or key, is in one of them.
struct PrefillSequence {
  int32_t first_item;  // of the plan's numbering; a sequence has tiles * heads items
  int32_t q_begin, q_end, k_begin, k_end;
  int32_t tiles;           // of query rows, in the backward of keys
  int32_t heads_together;  // query heads, in the backward key heads, whose tensors are meant to stay in L2 at one time
  int32_t reserved;

  constexpr int q_length() const { return q_end - q_begin; }
  constexpr int k_length() const { return k_end - k_begin; }
};
static_assert(sizeof(PrefillSequence) == 32);

struct PrefillPlan {
  int32_t num_items;
  int32_t num_sequences;
  int32_t num_taken;  // items that were handed out while the kernel runs, beyond the first of each CTA
  int32_t reserved[5];
};
static_assert(sizeof(PrefillPlan) == 32);

struct DensePrefillParams {
  const void* q;  // [tokens_q, h_q, d_qk]
  const void* k;  // [tokens_kv, h_kv, d_qk]
  const void* v;  // [tokens_kv, h_kv, 128]
  const int32_t* cu_seqlens_qo;
  const int32_t* cu_seqlens_kv;
  void* out;   // [tokens_q, h_q, 128], contiguous
  float* lse;  // [tokens_q, h_q], the tokens next to each other
  PrefillPlan* plan;
  PrefillSequence* planned;  // the longest ones first

  int64_t stride_q_t, stride_q_h;
  int64_t stride_k_t, stride_k_h;
  int64_t stride_v_t, stride_v_h;

  int tokens_q, tokens_kv;
  int num_sequences;
  int h_q, h_kv;
  int group;  // query heads per key head
  int d_qk;
  int row_tile;
  int num_sms;
  float softmax_scale;
  float scale_log2;  // softmax_scale * log2(e)
  bool causal;
};

}  // namespace flash_mla
