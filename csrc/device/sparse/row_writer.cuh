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

// Where the results of a thread's two rows go: of `row` and the one 8 further. Found ahead of time: sinks and facts of
// a piece take 1,000 cycles behind the producers' copies.
struct RowPlaces {
  bool exists[2];
  __nv_bfloat16* out[2];
  int64_t lse[2];
  float sink[2];

  __device__ __forceinline__ void find(const SparseAttentionParams& params, const PieceFacts& piece, int side, int row,
                                       int lane) {
    const int batch = params.by_tokens_per_batch.divide(piece.request),
              first_token = piece.request - batch * params.tokens_per_batch;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int tile_row = piece.row_tile * kRowTile + row + 8 * r, unit_row = piece.unit * params.unit_rows + tile_row,
                of_unit = params.by_h_q.divide(unit_row), token = first_token + of_unit,
                head = unit_row - of_unit * params.h_q;
      exists[r] = tile_row < params.unit_rows;
      sink[r] = load_if(params.attn_sink != nullptr && exists[r], params.attn_sink + head, -INFINITY);
      out[r] = static_cast<__nv_bfloat16*>(params.out) + batch * params.stride_out_b + token * params.stride_out_s +
               head * params.stride_out_h + side * 256 + lane % 4 * 8;
      lse[r] = batch * params.stride_lse_b + head * params.stride_lse_h + token * params.stride_lse_s;
    }
  }
};

// A warpgroup's half of the columns of its rows.
class RowWriter {
 public:
  __device__ __forceinline__ RowWriter(const SparseAttentionParams& params, const RowPlaces& places, int side, int lane,
                                       const float (&reference)[2], const float (&sum)[2], const float (&maximum)[2])
      : lane_(lane), places_(places) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool any_key = sum[r] != 0;
      scale_[r] = any_key ? 1.0f / (sum[r] + exp2f(places.sink[r] * kLog2E - reference[r])) : 0.0f;
      const float lse = reference[r] + log2f(sum[r]);
      const bool writes = side == 0 && places.exists[r] && lane % 4 == 0;
      store_if(writes, params.lse + places.lse[r], any_key ? (params.lse_base2 ? lse : lse * kLn2) : INFINITY);
      store_if(writes && params.max_logits != nullptr, params.max_logits + places.lse[r], maximum[r] * kLn2);
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
        store_streaming_if(places_.exists[r], places_.out[r] + kHalf * 128 + i * 32,
                           make_uint4(words[b][0], words[b][1], words[b][2], words[b][3]));
      }
    }
  }

 private:
  const int lane_;
  const RowPlaces& places_;
  float scale_[2];
};

}  // namespace flash_mla::inline device
