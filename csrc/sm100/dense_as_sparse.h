// Dense decode on the kernels of sparse attention: the keys of a request, by its block table, are the list of a single
// unit.
#pragma once

#include <algorithm>

#include "core/params/dense_decode.h"
#include "core/params/sparse_attention.h"

namespace flash_mla::sm100 {

inline SparseAttentionParams as_sparse(const DenseDecodeParams& dense, int kv_head) {
  constexpr int64_t kValueBytes = 2, kMostSlots = int64_t{1} << 31;
  const int64_t first_head = int64_t{kv_head} * dense.group, first_tile = int64_t{kv_head} * dense.num_row_tiles;
  SparseAttentionParams params{};
  params.q = static_cast<const char*>(dense.q) + first_head * dense.stride_q_h * kValueBytes;
  KeySource& keys = params.keys[0];
  keys.cache = static_cast<const char*>(dense.k_cache) + kv_head * dense.stride_k_h * kValueBytes;
  keys.indices = dense.block_table;
  keys.lengths = dense.cache_seqlens;
  keys.stride_page = dense.stride_k_page * kValueBytes, keys.stride_row = dense.stride_k_row * kValueBytes;
  keys.stride_indices_b = dense.stride_table_b, keys.stride_lengths_b = 1;
  keys.topk = dense.max_pages * dense.page;
  keys.page = dense.page, keys.page_shift = dense.page_shift;
  keys.num_slots = static_cast<uint32_t>(std::min(int64_t{dense.num_pages} * dense.page, kMostSlots));
  params.schedule = dense.schedule, params.num_splits = dense.num_splits;
  params.attn_sink = dense.attn_sink ? dense.attn_sink + first_head : nullptr;
  params.out = static_cast<char*>(dense.out) + first_head * dense.stride_out_h * kValueBytes;
  params.lse = dense.lse + first_head * dense.stride_lse_h;
  if (dense.partial_out != nullptr) {
    const int64_t value_bytes = dense.partial_scale != nullptr ? 2 : 4;
    params.partial_out = static_cast<char*>(dense.partial_out) + first_tile * kPartialTile * value_bytes;
    params.partial_scale = dense.partial_scale ? dense.partial_scale + first_tile * kPartialScales : nullptr;
    params.partial_lse = dense.partial_lse + first_tile * kRowTile;
  }
  params.stride_q_b = dense.stride_q_b, params.stride_q_s = dense.stride_q_s, params.stride_q_h = dense.stride_q_h;
  params.stride_out_b = dense.stride_out_b, params.stride_out_s = dense.stride_out_s;
  params.stride_out_h = dense.stride_out_h;
  params.stride_lse_b = dense.stride_lse_b, params.stride_lse_h = dense.stride_lse_h;
  params.stride_lse_s = dense.stride_lse_s;
  params.b = params.num_requests_total = dense.b, params.s_q = dense.s_q, params.h_q = dense.group;
  params.tokens_per_batch = params.num_units = 1;
  params.partial_units = dense.h_kv;
  params.unit_rows = dense.s_q * dense.group, params.unit_tiles = dense.num_row_tiles;
  params.num_sms = dense.num_sms;
  params.num_parts = dense.num_parts, params.max_cuts = dense.max_cuts;
  params.first_request = dense.first_request, params.num_requests = dense.num_requests;
  params.scale_log2 = dense.scale_log2;
  params.from_table = true;
  params.causal = dense.causal;
  return params;
}

// MLA has one key head. More of them are served one after the other.
template <class Launch>
void for_each_key_head(const DenseDecodeParams& params, Launch&& launch) {
  for (int kv_head = 0; kv_head < params.h_kv; ++kv_head) {
    launch(as_sparse(params, kv_head));
  }
}

}  // namespace flash_mla::sm100
