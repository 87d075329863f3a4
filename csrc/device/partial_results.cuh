// Partial results in half precision, as core/params/dense_decode.h describes them.
#pragma once

#include <cuda_fp16.h>

#include "core/params/dense_decode.h"
#include "device/copy.cuh"
#include "device/numeric.cuh"

namespace flash_mla::inline device {

// A power of two that brings numbers of up to `largest` into the range of half precision, and its inverse.
struct RangeScale {
  float to_half, from_half;
  __device__ __forceinline__ explicit RangeScale(float largest) {
    // Of the numbers up to 2^n the largest is to be below 2^15. Neither factor may be a denormal number.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);
    to_half = __uint_as_float((2 * 127 + 14 - exponent) << 23);
    from_half = __uint_as_float((exponent - 14) << 23);
  }
};

// A warp's 16 rows and one half of their columns, `output` over the sum of each row; `has_rows`: besides what there is
// one of per row. `tile`: which of the partial row tiles.
template <class Params>
__device__ __forceinline__ void store_partial(const Params& params, int64_t tile, int group, int side, bool has_rows,
                                              int lane, const float (&output)[2][64], const float (&reference)[2],
                                              const float (&sum)[2]) {
  if (has_rows && lane % 4 == 0) {
    // No sum is a logarithm of -inf.
    *reinterpret_cast<float2*>(params.partial_lse + tile * kRowTile + group * 16 + lane / 4 * 2) =
        make_float2(reference[0] + log2f(sum[0]), reference[1] + log2f(sum[1]));
  }
  float scale[2], from_half[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float largest = 0;
#pragma unroll
    for (int i = 0; i < 64; i += 4) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        largest = fmaxf(largest, fmaxf(fabsf(output[half][i + 2 * r]), fabsf(output[half][i + 2 * r + 1])));
      }
    }
    scale[r] = sum[r] != 0 ? 1.0f / sum[r] : 0.0f;
    const RangeScale range(largest * scale[r]);
    scale[r] *= range.to_half;
    from_half[r] = range.from_half;
  }
  *reinterpret_cast<float2*>(params.partial_scale + partial_scale_offset(tile, group, side) + lane * 2) =
      make_float2(from_half[0], from_half[1]);
  // In L2 until the combine kernel has read them, which drops them then: every line that goes to memory in between
  // holds up the loads of keys.
  const uint64_t policy = evict_last_policy();
  __half* out = static_cast<__half*>(params.partial_out) + tile * kPartialTile + group * kPartialGroup +
                side * kPartialBlocks / 2 * kPartialBlock + lane * 8;
#pragma unroll
  for (int block = 0; block < kPartialBlocks / 2; block += 2) {
    const float* values = &output[block / 16][block % 16 * 4];
    store_hinted(out + block * kPartialBlock,
                 make_uint4(pack2<__half>(values[0] * scale[0], values[1] * scale[0]),
                            pack2<__half>(values[2] * scale[1], values[3] * scale[1]),
                            pack2<__half>(values[4] * scale[0], values[5] * scale[0]),
                            pack2<__half>(values[6] * scale[1], values[7] * scale[1])),
                 policy);
  }
}

}  // namespace flash_mla::inline device
