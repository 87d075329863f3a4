// What the backward of dense prefill is given, and its work items. Strides are in elements.
#pragma once

#include <cstdint>

#include "core/params/dense_prefill.h"

namespace flash_mla {

// Keys of a work item: consecutive tokens of one sequence and key head.
constexpr int kBackwardKeyTile = 128;

// Queries that an item meets at a time.
constexpr int kBackwardQueryTile = 64;

// A tile of keys, and the queries of its sequence. Queries that see no key of the sequence are left out.
struct BackwardItem {
  int32_t first_query;  // token of the sequence's first query that sees a key
  int32_t num_queries;  // from there to the sequence's end
  int32_t first_key;    // token
  int32_t num_keys;     // 1 to kBackwardKeyTile; 0: there are no more items
  int32_t kv_head;
  int32_t first_tile;  // of queries: those from there on see some of the keys
  int32_t limit;       // keys that query 0 sees, may be negative; each further one sees one more in a causal call
  int32_t key_tile;    // of the sequence
};
static_assert(sizeof(BackwardItem) == 32);

struct DensePrefillBackwardParams {
  DensePrefillParams forward;  // out and lse are its results; plan and planned are of the backward
  const void* d_out;           // [tokens_q, h_q, 128]
  const float* d_lse;          // [tokens_q, h_q]
  void* dq;                    // those of the gradients are contiguous
  void* dk;
  void* dv;

  // Workspace.
  float* dq_sum;  // [h_q, tokens_q, d_qk], without the scale
  float* deltas;  // [h_q, tokens_q]: d_out . out - d_lse
  BackwardItem* items;
  int32_t* turns;  // [h_q, tokens_q]: how many items have added to dq_sum, by a tile's first token. Null: in any order

  int64_t stride_do_t, stride_do_h;
  int64_t stride_dlse_t, stride_dlse_h;
  Element element;
};

}  // namespace flash_mla
