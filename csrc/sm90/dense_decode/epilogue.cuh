// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. Straight
// from registers, so that the key slots go on filling.
#pragma once

#include "device/numeric.cuh"
#include "device/partial_results.cuh"
#include "sm90/dense_decode/pieces.cuh"

namespace flash_mla::sm90::dense_decode {

// `row` is the first of the thread's two rows of the tile, the other is 8 further.
// `side`: which half of the columns.
__device__ __forceinline__ void write_partial(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                              int side, int row, int lane, const float (&output)[2][64],
                                              const float (&reference)[2], const float (&sum)[2]) {
  const int group = row / 16;
  if (place.row_tile * kRowTile + group * 16 >= params.s_q * params.group) {
    return;
  }
  const int64_t tile =
      (static_cast<int64_t>(piece.partial) * params.h_kv + place.kv_head) * params.num_row_tiles + place.row_tile;
  store_partial<false>(params, tile, group, side, side == 0, lane, output, reference, sum);
}

template <class T>
__device__ __forceinline__ void write_final(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                            int side, int row, int lane, const float (&output)[2][64],
                                            const float (&reference)[2], const float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int global_row = place.row_tile * kRowTile + row + 8 * r;
    const bool exists = global_row < params.s_q * params.group, any_key = sum[r] != 0;
    const int token = global_row / params.group, head = place.kv_head * params.group + global_row % params.group;
    const float sink = params.attn_sink && exists ? exp2f(params.attn_sink[head] * kLog2E - reference[r]) : 0.0f;
    const float scale = any_key ? 1.0f / (sum[r] + sink) : 0.0f;
    T* out = static_cast<T*>(params.out) + piece.request * params.stride_out_b + token * params.stride_out_s +
             head * params.stride_out_h + side * 256;
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // 32 columns: a quad's four words become four runs of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i % 4 * 16 + j * 4 + 2 * r;
        words[j] = pack2<T>(output[i / 4][at] * scale, output[i / 4][at + 1] * scale);
      }
      transpose_quad(words, lane);
      if (exists) {
        *reinterpret_cast<uint4*>(out + i * 32 + lane % 4 * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    if (side == 0 && exists && lane % 4 == 0) {
      params.lse[piece.request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
          any_key ? (reference[r] + log2f(sum[r])) * kLn2 : INFINITY;
    }
  }
}

}  // namespace flash_mla::sm90::dense_decode
