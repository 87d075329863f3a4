// Writing a piece that is a whole list, beside products: branches would make the compiler wait for them, so stores are
// predicated.
#pragma once

#include "core/params/sparse_attention.h"
#include "device/numeric.cuh"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// Results are not read again here: L2 had better keep the keys.
__device__ __forceinline__ void store_streaming_if(bool stores, void* address, const uint4& words) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.cs.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<uint32_t>(stores)),
               "l"(address), "r"(words.x), "r"(words.y), "r"(words.z), "r"(words.w)
               : "memory");
}

__device__ __forceinline__ void store_if(bool stores, float* address, float value) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.u32 p, %0, 0;\n@p st.global.f32 [%1], %2;\n}" ::"r"(static_cast<uint32_t>(stores)),
      "l"(address), "f"(value)
      : "memory");
}

__device__ __forceinline__ float load_if(bool loads, const float* address, float otherwise) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %1, 0;\n@p ld.global.nc.f32 %0, [%2];\n}"
               : "+f"(otherwise)
               : "r"(static_cast<uint32_t>(loads)), "l"(address));
  return otherwise;
}

// A warpgroup's half of the columns of its rows, of which a thread has two: `row` and the one 8 further.
class RowWriter {
 public:
  __device__ __forceinline__ RowWriter(const SparseAttentionParams& params, const PieceFacts& piece, int side, int row,
                                       int lane, const float (&reference)[2], const float (&sum)[2],
                                       const float (&maximum)[2])
      : lane_(lane) {
    const int batch = params.by_tokens_per_batch.divide(piece.request),
              first_token = piece.request - batch * params.tokens_per_batch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile_row = piece.row_tile * kRowTile + row + 8 * r, unit_row = piece.unit * params.unit_rows + tile_row,
                of_unit = params.by_h_q.divide(unit_row), token = first_token + of_unit,
                head = unit_row - of_unit * params.h_q;
      exists_[r] = tile_row < params.unit_rows;
      const bool any_key = sum[r] != 0;
      const float sink = load_if(params.attn_sink != nullptr && exists_[r], params.attn_sink + head, -INFINITY);
      scale_[r] = any_key ? 1.0f / (sum[r] + exp2f(sink * kLog2E - reference[r])) : 0.0f;
      out_[r] = static_cast<__nv_bfloat16*>(params.out) + batch * params.stride_out_b + token * params.stride_out_s +
                head * params.stride_out_h + side * 256 + lane % 4 * 8;
      const float lse = reference[r] + log2f(sum[r]);
      const int64_t offset = batch * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s;
      const bool writes = side == 0 && exists_[r] && lane % 4 == 0;
      store_if(writes, params.lse + offset, any_key ? (params.lse_base2 ? lse : lse * kLn2) : INFINITY);
      store_if(writes && params.max_logits != nullptr, params.max_logits + offset, maximum[r] * kLn2);
    }
  }

  // 128 of the columns.
  template <int kHalf>
  __device__ __forceinline__ void write(const float (&output)[64]) const {
    constexpr int kMatrices = 4;
#pragma unroll
    for (int first = 0; first < 8; first += kMatrices) {
      uint32_t words[kMatrices][4];
#pragma unroll
      for (int b = 0; b < kMatrices; ++b) {
        const int i = (first + b) / 2, r = b % 2;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int at = i * 16 + j * 4 + 2 * r;
          words[b][j] = pack2<__nv_bfloat16>(output[at] * scale_[r], output[at + 1] * scale_[r]);
        }
      }
      transpose_quads(words, lane_);
#pragma unroll
      for (int b = 0; b < kMatrices; ++b) {
        const int i = (first + b) / 2, r = b % 2;
        store_streaming_if(exists_[r], out_[r] + kHalf * 128 + i * 32,
                           make_uint4(words[b][0], words[b][1], words[b][2], words[b][3]));
      }
    }
  }

 private:
  const int lane_;
  float scale_[2];
  __nv_bfloat16* out_[2];
  bool exists_[2];
};

}  // namespace flash_mla::inline device
