// What the dense decode kernels are given. Strides are in elements. Row r of a row tile is query token r / group, head
// kv_head * group + r % group.
#pragma once

#include <cstdint>

#include "core/schedule.h"

namespace flash_mla {

enum class Element : int { kBFloat16 = 0, kFloat16 = 1, kOther = 2 };

constexpr int kRowTile = 64;
constexpr int kHeadDimV = 512;

// A partial result is a row tile in the order in which wgmma's accumulators hold it, so that a warp stores and loads
// runs of 512 bytes: 16-row group, 8-column block, lane, then (row, column), (row, column + 1) and the same columns of
// row + 8, where row is lane / 4 of the group and column lane % 4 * 2 of the block. Rows r and r + 8 of a group are a
// pair; log-sum-exps lie pair by pair.
//
// In float32, or in half precision, where the blocks of a lane lie in twos, and what a lane has of a row in one half of
// the columns has a power of two that its values are to be multiplied by.
constexpr int kPartialBlocks = kHeadDimV / 8;
constexpr int kPartialTile = kRowTile * kHeadDimV;
constexpr int kPartialGroup = 16 * kHeadDimV;
constexpr int kPartialBlock = 16 * 8;
constexpr int kPartialScales = 4 * 2 * 32 * 2;  // of a tile: 16-row group, half of the columns, lane, row of the pair

// Of a warp's scales; `side`: which half of the columns.
constexpr int64_t partial_scale_offset(int64_t tile, int group, int side) {
  return tile * kPartialScales + (group * 2 + side) * 64;
}

// What a call asks for, as far as the choice of a kernel goes.
struct DenseDecodeProblem {
  int compute_capability;
  Element element;
  int b, s_q, h_q, h_kv, d_qk, d_v, page_block_size;
  float softmax_scale;
};

struct DenseDecodeParams {
  const void* q;        // [b, s_q, h_q, d_qk]
  const void* k_cache;  // [num_pages, page, h_kv, d_qk]
  const int32_t* block_table;
  const int32_t* cache_seqlens;
  const ScheduleRow* schedule;  // null: fixed cuts
  const int32_t* num_splits;
  const float* attn_sink;  // null: none
  void* out;               // [b, s_q, h_q, 512]
  float* lse;              // [b, h_q, s_q]
  void* partial_out;       // [partials, h_kv, row tiles, kPartialTile]; null: nothing can be split
  float* partial_scale;    // [partials, h_kv, row tiles, kPartialScales]; null: partial_out is float32, else half
  float* partial_lse;      // [partials, h_kv, row tiles, pairs, 2], base 2; -inf: no key, and zeros in partial_out

  int64_t stride_q_b, stride_q_s, stride_q_h;
  int64_t stride_k_page, stride_k_row, stride_k_h;
  int64_t stride_table_b;
  int64_t stride_out_b, stride_out_s, stride_out_h;
  int64_t stride_lse_b, stride_lse_h, stride_lse_s;

  int b, s_q, h_q, h_kv;
  int group;  // query heads per key head
  int num_row_tiles;
  int page, num_pages, max_pages;  // max_pages: entries of a block table's row
  int box_rows;                    // rows of a TMA box, 0: pages that TMA cannot tile
  int page_shift;                  // log2(page), -1: not a power of two
  int num_sms;
  int num_parts;
  int max_cuts;       // fixed cuts: pieces per request at the most
  int first_request;  // fixed cuts: the launch serves requests from here on
  int num_requests;   // fixed cuts: and so many of them
  float scale_log2;   // softmax_scale * log2(e)
  bool causal;
  Element element;
};

}  // namespace flash_mla
