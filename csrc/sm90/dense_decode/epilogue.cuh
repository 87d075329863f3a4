// Writing a piece: the final rows where it is a whole request, else a partial result for the combine kernel. Straight
// from registers, so that the key slots go on filling.
#pragma once

#include "device/numeric.cuh"
#include "sm90/dense_decode/pieces.cuh"

namespace flash_mla::sm90::dense_decode {

template <class T, int kSide>
__device__ __forceinline__ void write_piece(const DenseDecodeParams& params, const Place& place, const Piece& piece,
                                            int row, int lane, float (&output)[2][64], const float (&reference)[2],
                                            const float (&sum)[2]) {
  const int num_rows = params.s_q * params.group;
  const bool direct = piece.partial < 0;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int tile_row = row + 8 * r, global_row = place.row_tile * kRowTile + tile_row;
    const bool any_key = sum[r] > 0;
    const float lse2 = reference[r] + log2f(sum[r]);
    if (direct) {
      const bool exists = global_row < num_rows;
      const int token = global_row / params.group, head = place.kv_head * params.group + global_row % params.group;
      const float sink = params.attn_sink && exists ? exp2f(params.attn_sink[head] * kLog2E - reference[r]) : 0.0f;
      const float scale = any_key ? 1.0f / (sum[r] + sink) : 0.0f;
      T* out = static_cast<T*>(params.out) + piece.request * params.stride_out_b + token * params.stride_out_s +
               head * params.stride_out_h + kSide * 256;
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
      if (kSide == 0 && exists && lane % 4 == 0) {
        params.lse[piece.request * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s] =
            any_key ? lse2 * kLn2 : INFINITY;
      }
    } else {
      const int64_t tile =
          (static_cast<int64_t>(piece.partial) * params.h_kv + place.kv_head) * params.num_row_tiles + place.row_tile;
      if (kSide == 0 && lane % 4 == 0) {
        params.partial_lse[tile * kRowTile + tile_row] = any_key ? lse2 : -INFINITY;
      }
      if (global_row < num_rows && any_key) {
        const float scale = 1.0f / sum[r];
        float* out = params.partial_out + (tile * kRowTile + tile_row) * kHeadDimV + kSide * 256 + lane % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; i += 4) {
          const int at = i + 2 * r, column = 2 * i;
          *reinterpret_cast<float2*>(out + column) = make_float2(output[0][at] * scale, output[0][at + 1] * scale);
          *reinterpret_cast<float2*>(out + 128 + column) =
              make_float2(output[1][at] * scale, output[1][at + 1] * scale);
        }
      }
    }
  }
}

}  // namespace flash_mla::sm90::dense_decode
