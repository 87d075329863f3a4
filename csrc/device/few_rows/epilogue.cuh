// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. The
// accumulators hold the output transposed: a lane has one or two columns of it, of all query rows.
#pragma once

#include "device/few_rows/storage.h"
#include "device/numeric.cuh"
#include "device/sparse/epilogue.cuh"

namespace flash_mla::inline device {

// The query rows that are columns of a lane's accumulators. Accumulator i is of own row i / 4 * 2 + i % 2, and of the
// warp's 16 keys or columns number lane / 4 + i % 4 / 2 * 8.
template <class C>
struct RowFragment {
  static constexpr int kOwnRows = C::kRows / 4;
  static __device__ __forceinline__ int row(int own, int lane) { return own / 2 * 8 + lane % 4 * 2 + own % 2; }
};

// What is known of a row at the end of a piece.
struct RowResult {
  float sum, reference, maximum;
};

template <class C, class Storage>
__device__ __forceinline__ RowResult row_result(const Storage& storage, int row, float reference) {
  RowResult result{0, reference, -INFINITY};
#pragma unroll
  for (int warp = 0; warp < C::kMathWarps; ++warp) {
    result.sum += storage.row_sum[warp][row];
    result.maximum = fmaxf(result.maximum, storage.row_max[warp][row]);
  }
  return result;
}

// Lanes that hold neighbouring columns exchange halves, and then hold both columns of one row, `row`, and of the one
// that is 8 further, of each group of 16 rows. `output`: blocks of 64 columns, from `first_block` on.
// `kPartial`: the piece is known to be no whole request.
template <class C, bool kPartial = false, class Storage, int kBlocks>
__device__ __forceinline__ void write_few_rows(const SparseAttentionParams& params, const Storage& storage,
                                               const PieceFacts& piece, int warp, int lane, int first_block,
                                               const float (&output)[kBlocks][C::kRows / 2],
                                               const float (&reference)[C::kRows / 4]) {
  const bool odd = lane / 4 % 2;
  const int row = lane % 4 * 2 + odd, pair = lane / 8;  // of 4 pairs of columns
  const float descale = descale_of_output<C::kFormat>(params);
  const bool writes_rows = first_block == 0 && warp == 0 && lane < 8;
#pragma unroll
  for (int group = 0; group < C::kRows / 16; ++group) {
    if (group * 16 >= params.unit_rows) {
      return;
    }
    RowResult result[2];
    float scale[2];
    typename C::Element* out[2];
    bool exists[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = group * 4 + r * 2;
      const int tile_row = group * 16 + row + 8 * r;
      result[r] = row_result<C>(storage, tile_row, odd ? reference[own + 1] : reference[own]);
      const bool any_key = result[r].sum != 0;
      scale[r] = any_key ? descale / result[r].sum : 0.0f;
      if (!kPartial && piece.partial < 0) {
        const RowPlace place(params, piece, tile_row);
        exists[r] = place.exists;
        if (params.attn_sink && place.exists) {
          const float sink = exp2f(params.attn_sink[place.head] * kLog2E - result[r].reference);
          scale[r] = any_key ? descale / (result[r].sum + sink) : 0.0f;
        }
        out[r] = static_cast<typename C::Element*>(params.out) + place.batch * params.stride_out_b +
                 place.token * params.stride_out_s + place.head * params.stride_out_h;
        if (writes_rows && place.exists) {
          const float lse = result[r].reference + log2f(result[r].sum);
          const int64_t offset = place.offset(params);
          params.lse[offset] = any_key ? (params.lse_base2 ? lse : lse * kLn2) : INFINITY;
          if (params.max_logits != nullptr) {
            params.max_logits[offset] = result[r].maximum * kLn2;
          }
        }
      }
    }
    const int64_t tile = (static_cast<int64_t>(piece.partial) * params.partial_units + piece.unit) * params.unit_tiles;
    float* partial =
        static_cast<float*>(params.partial_out) + tile * kPartialTile + group * kPartialGroup + (row * 4 + pair) * 4;
    if ((kPartial || piece.partial >= 0) && writes_rows) {
      // No sum is a logarithm of -inf.
      *reinterpret_cast<float2*>(params.partial_lse + tile * kRowTile + group * 16 + row * 2) =
          make_float2(result[0].reference + log2f(result[0].sum), result[1].reference + log2f(result[1].sum));
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // of the warp's 16 columns
        float2 columns[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int at = group * 8 + r * 4 + half * 2;
          const float keep = odd ? output[block][at + 1] : output[block][at],
                      send = odd ? output[block][at] : output[block][at + 1];
          const float other = __shfl_xor_sync(~0u, send, 4);
          columns[r] = odd ? make_float2(other, keep) : make_float2(keep, other);
          columns[r].x *= scale[r];
          columns[r].y *= scale[r];
        }
        const int eight = (first_block + block) * 8 + warp * 2 + half;  // which 8 columns
        if (kPartial || piece.partial >= 0) {
          *reinterpret_cast<float4*>(partial + eight * kPartialBlock) =
              make_float4(columns[0].x, columns[0].y, columns[1].x, columns[1].y);
        } else {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            if (exists[r]) {
              *reinterpret_cast<uint32_t*>(out[r] + eight * 8 + pair * 2) =
                  pack2<typename C::Element>(columns[r].x, columns[r].y);
            }
          }
        }
      }
    }
  }
}

}  // namespace flash_mla::inline device
