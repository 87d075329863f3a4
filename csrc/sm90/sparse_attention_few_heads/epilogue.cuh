// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. A lane has
// four neighbouring columns of a quarter of the query rows.
#pragma once

#include "device/numeric.cuh"
#include "sm90/sparse_attention/epilogue.cuh"
#include "sm90/sparse_attention_few_heads/storage.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// What is stored of a row besides its columns, and what the columns' writers have to know of it.
template <class C>
__device__ __forceinline__ void finish_row(const SparseAttentionParams& params, Storage<C>& storage,
                                           const PieceFacts& piece, int row) {
  float sum = 0, maximum = -INFINITY;
#pragma unroll
  for (int warp = 0; warp < 4 * kSides; ++warp) {
    sum += storage.scratch[warp / 4][warp % 4][row];
    maximum = fmaxf(maximum, storage.maxima[warp / 4][warp % 4][row]);
  }
  const bool any_key = sum != 0;
  const float reference = storage.references[row].maximum, base2 = reference + log2f(sum);
  RowResult result{any_key ? 1.0f / sum : 0.0f, -1};
  if (piece.partial >= 0) {
    if (piece.row_tile * C::kRows + row / 16 * 16 < params.unit_rows) {
      const int64_t tile =
          (static_cast<int64_t>(piece.partial) * params.num_units + piece.unit) * params.unit_tiles + piece.row_tile;
      // Rows of 16 are stored as they are combined: a row and the one 8 further. No sum is a logarithm of -inf.
      params.partial_lse[tile * kRowTile + row / 16 * 16 + row % 8 * 2 + row % 16 / 8] = base2;
      result.out = tile * kPartialTile + row / 16 * kPartialGroup;
    }
  } else {
    const sparse_attention::RowPlace place(params, piece, row);
    if (place.exists) {
      if (params.attn_sink && any_key) {
        result.scale = 1.0f / (sum + exp2f(params.attn_sink[place.head] * kLog2E - reference));
      }
      const int64_t offset = place.offset(params);
      params.lse[offset] = any_key ? (params.lse_base2 ? base2 : base2 * kLn2) : INFINITY;
      if (params.max_logits != nullptr) {
        params.max_logits[offset] = maximum * kLn2;
      }
      result.out =
          place.batch * params.stride_out_b + place.token * params.stride_out_s + place.head * params.stride_out_h;
    }
  }
  storage.results[row] = result;
}

// With the lane that has the neighbouring four columns: `low` for its `high`, or the other way round where `odd`.
__device__ __forceinline__ float4 exchange(const float4& low, const float4& high, bool odd) {
  return make_float4(__shfl_xor_sync(~0u, odd ? low.x : high.x, 4), __shfl_xor_sync(~0u, odd ? low.y : high.y, 4),
                     __shfl_xor_sync(~0u, odd ? low.z : high.z, 4), __shfl_xor_sync(~0u, odd ? low.w : high.w, 4));
}

__device__ __forceinline__ float4 select(bool first, const float4& x, const float4& y) {
  return make_float4(first ? x.x : y.x, first ? x.y : y.y, first ? x.z : y.z, first ? x.w : y.w);
}

// Product p of `output` has columns 4 (lane / 4) + 2 p and the next one; of row `own` (row own / 2 * 8 + lane % 4 * 2 +
// own % 2 of the tile) they are numbers own / 2 * 4 + own % 2 and the one 2 further.
template <class C>
__device__ __forceinline__ void write_columns(const SparseAttentionParams& params, const Storage<C>& storage,
                                              const PieceFacts& piece, int side, int warp, int lane,
                                              const float (&output)[2][C::kRows / 2]) {
  const int eight = side * (kPartialBlocks / kSides) + warp * 4 + lane / 8;  // which eight columns
  const bool odd = lane / 4 % 2;
#pragma unroll
  for (int group = 0; group < C::kRows / 16; ++group) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = lane % 4 * 2 + e, at = group * 8 + e;
      const RowResult results[2] = {storage.results[group * 16 + row], storage.results[group * 16 + row + 8]};
      const float *const x = output[0] + at, *const y = output[1] + at;
      if (piece.partial >= 0) {
        // Lanes with neighbouring columns exchange halves, so that each store fills whole sectors of 32 bytes.
        const float4 low = make_float4(x[0] * results[0].scale, x[2] * results[0].scale, x[4] * results[1].scale,
                                       x[6] * results[1].scale),
                     high = make_float4(y[0] * results[0].scale, y[2] * results[0].scale, y[4] * results[1].scale,
                                        y[6] * results[1].scale);
        const float4 other = exchange(low, high, odd);
        if (results[0].out >= 0) {
          float* const out = params.partial_out + results[0].out + eight * kPartialBlock + row * 16 + odd * 4;
          *reinterpret_cast<float4*>(out) = select(odd, other, low);
          *reinterpret_cast<float4*>(out + 8) = select(odd, high, other);
        }
      } else {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          if (results[r].out >= 0) {
            *reinterpret_cast<uint2*>(static_cast<__nv_bfloat16*>(params.out) + results[r].out + eight * 8 + odd * 4) =
                make_uint2(pack2<__nv_bfloat16>(x[4 * r] * results[r].scale, x[4 * r + 2] * results[r].scale),
                           pack2<__nv_bfloat16>(y[4 * r] * results[r].scale, y[4 * r + 2] * results[r].scale));
          }
        }
      }
    }
  }
}

}  // namespace flash_mla::sm90::sparse_attention_few_heads
