// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. Straight
// from registers, so that the key slots go on filling.
#pragma once

#include <cfloat>

#include "core/params/sparse_attention.h"
#include "device/numeric.cuh"
#include "device/partial_results.cuh"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// `row` is the first of the thread's two rows of the tile, the other is 8 further.
// `side`: which half of the columns; `has_rows`: whether this warpgroup is the one of the two halves that writes what
// there is one of per row.
template <bool kAsItIs = false>
__device__ __forceinline__ void write_partial(const SparseAttentionParams& params, const PieceFacts& piece, int side,
                                              bool has_rows, int row, int lane, const float (&output)[2][64],
                                              const float (&reference)[2], const float (&sum)[2]) {
  const int group = row / 16;
  if (piece.row_tile * kRowTile + group * 16 >= params.unit_rows) {
    return;
  }
  const int64_t tile =
      (static_cast<int64_t>(piece.partial) * params.partial_units + piece.unit) * params.unit_tiles + piece.row_tile;
  store_partial<kAsItIs>(params, tile, group, side, has_rows, lane, output, reference, sum);
}

// Formats of one scale: what scores are to be multiplied by beside the softmax scale, and the output.
template <KVFormat kFormat>
__device__ __forceinline__ float descale_of_output(const SparseAttentionParams& params) {
  return has_one_scale(kFormat) && params.descale_k != nullptr ? *params.descale_k : 1.0f;
}

template <KVFormat kFormat>
__device__ __forceinline__ float scale_of_scores(const SparseAttentionParams& params) {
  const float of_query = has_one_scale(kFormat) && params.descale_q != nullptr ? *params.descale_q : 1.0f;
  // As a softmax scale of 0, one of 0 here has to be no more than very small.
  return has_one_scale(kFormat) ? fmaxf(params.scale_log2 * of_query * descale_of_output<kFormat>(params), FLT_MIN)
                                : params.scale_log2;
}

// Where a row of a tile belongs.
struct RowPlace {
  int batch, token, head;
  bool exists;
  __device__ __forceinline__ RowPlace(const SparseAttentionParams& params, const PieceFacts& piece, int row) {
    const int tile_row = piece.row_tile * kRowTile + row, unit_row = piece.unit * params.unit_rows + tile_row;
    batch = piece.request / params.tokens_per_batch;
    token = piece.request % params.tokens_per_batch + unit_row / params.h_q;
    head = unit_row % params.h_q;
    exists = tile_row < params.unit_rows;
  }
  // In lse and max_logits.
  __device__ __forceinline__ int64_t offset(const SparseAttentionParams& params) const {
    return batch * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s;
  }
};

// A warpgroup's maxima, base 2, for the one that has the rows to finish: it reads them once the sums have been handed
// over.
__device__ __forceinline__ void write_maximum(const SparseAttentionParams& params, const PieceFacts& piece, int row,
                                              int lane, const float (&maximum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowPlace place(params, piece, row + 8 * r);
    if (place.exists && lane % 4 == 0) {
      params.max_logits[place.offset(params)] = maximum[r];
    }
  }
}

template <class T = __nv_bfloat16>
__device__ __forceinline__ void write_final(const SparseAttentionParams& params, const PieceFacts& piece, int side,
                                            bool has_rows, int row, int lane, const float (&output)[2][64],
                                            const float (&reference)[2], const float (&sum)[2],
                                            const float (&maximum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const RowPlace place(params, piece, row + 8 * r);
    const bool any_key = sum[r] != 0;
    const float sink =
        params.attn_sink && place.exists ? exp2f(params.attn_sink[place.head] * kLog2E - reference[r]) : 0.0f;
    const float scale = any_key ? 1.0f / (sum[r] + sink) : 0.0f;
    T* out = static_cast<T*>(params.out) + place.batch * params.stride_out_b + place.token * params.stride_out_s +
             place.head * params.stride_out_h + side * 256;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 32 columns: a quad's four words become four runs of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i % 4 * 16 + j * 4 + 2 * r;
        words[j] = pack2<T>(output[i / 4][at] * scale, output[i / 4][at + 1] * scale);
      }
      transpose_quad(words, lane);
      if (place.exists) {
        *reinterpret_cast<uint4*>(out + i * 32 + lane % 4 * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    if (has_rows && place.exists && lane % 4 == 0) {
      const float lse = reference[r] + log2f(sum[r]);
      const int64_t offset = place.offset(params);
      params.lse[offset] = any_key ? (params.lse_base2 ? lse : lse * kLn2) : INFINITY;
      if (params.max_logits != nullptr) {
        params.max_logits[offset] = fmaxf(maximum[r], params.max_logits[offset]) * kLn2;
      }
    }
  }
}

}  // namespace flash_mla::inline device
