// Partial results in half precision, as core/params/dense_decode.h describes them.
#pragma once

#include <cuda_fp16.h>

#include "core/params/dense_decode.h"
#include "device/copy.cuh"
#include "device/numeric.cuh"

namespace flash_mla::inline device {

// A power of two that brings numbers of up to `largest` into the range of half precision, and its inverse. Beside an
// infinity all others become zeros.
struct RangeScale {
  float to_half, from_half;
  __device__ __forceinline__ explicit RangeScale(float largest) {
    // Of the numbers up to 2^n the largest is to be below 2^15. Neither factor may be a denormal number.
    const uint32_t exponent = max(__float_as_uint(largest) >> 23, 15u);
    to_half = __uint_as_float((2 * 127 + 14 - exponent) << 23);
    from_half = __uint_as_float((exponent - 14) << 23);
  }
};

// A lane's largest number of a row, as bits: it is to have seven bits more than the smallest normal one, at the least.
constexpr uint32_t kLeastHalf = 0x2000, kInfiniteHalf = 0x7c00;

// The larger absolute values of two pairs. NaN counts for nothing.
__device__ __forceinline__ uint32_t largest_halves(uint32_t a, uint32_t b) {
  asm("{\n.reg .b32 x, y;\nabs.f16x2 x, %0;\nabs.f16x2 y, %1;\nmax.f16x2 %0, x, y;\n}" : "+r"(a) : "r"(b));
  return a;
}

// A warp's 16 rows and one half of their columns, `output` over the sum of each row; `has_rows`: besides what there is
// one of per row. `tile`: which of the partial row tiles.
//
// `kAsItIs`: `output` is stored as it is, which nearly always fits, and again where it turns out not to. So fewer
// instructions run, which matters where they run for the first time.
template <bool kAsItIs, class Params>
__device__ __forceinline__ void store_partial(const Params& params, int64_t tile, int group, int side, bool has_rows,
                                              int lane, const float (&output)[2][64], const float (&reference)[2],
                                              const float (&sum)[2]) {
  // In L2 until the combine kernel has read them, which drops them then: every line that goes to memory in between
  // holds up the loads of keys.
  const uint64_t policy = evict_last_policy();
  __half* out = static_cast<__half*>(params.partial_out) + tile * kPartialTile + group * kPartialGroup +
                side * kPartialBlocks / 2 * kPartialBlock + lane * 8;
  float scale[2] = {sum[0] != 0 ? 1.0f / sum[0] : 0.0f, sum[1] != 0 ? 1.0f / sum[1] : 0.0f};
  bool fits = false;
  if constexpr (kAsItIs) {
    uint32_t largest[2] = {};
#pragma unroll
    for (int block = 0; block < kPartialBlocks / 2; block += 2) {
      const float* values = &output[block / 16][block % 16 * 4];
      const uint4 words = make_uint4(pack2<__half>(values[0], values[1]), pack2<__half>(values[2], values[3]),
                                     pack2<__half>(values[4], values[5]), pack2<__half>(values[6], values[7]));
      store_hinted(out + block * kPartialBlock, words, policy);
      largest[0] = largest_halves(largest_halves(largest[0], words.x), words.z);
      largest[1] = largest_halves(largest_halves(largest[1], words.y), words.w);
    }
    fits = true;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t of_row = max(largest[r] & 0xffff, largest[r] >> 16);
      fits &= sum[r] == 0 || (of_row >= kLeastHalf && of_row < kInfiniteHalf);
    }
    fits = __all_sync(~0u, fits);
  }
  if (!fits) {
    float to_half[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float most = 0;
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) {
        most = fmaxf(fmaxf(most, fmaxf(fabsf(output[0][i]), fabsf(output[0][i + 1]))),
                     fmaxf(fabsf(output[1][i]), fabsf(output[1][i + 1])));
      }
      const RangeScale range(most);
      to_half[r] = range.to_half;
      scale[r] *= range.from_half;
    }
#pragma unroll
    for (int block = 0; block < kPartialBlocks / 2; block += 2) {
      const float* values = &output[block / 16][block % 16 * 4];
      store_hinted(out + block * kPartialBlock,
                   make_uint4(pack2<__half>(values[0] * to_half[0], values[1] * to_half[0]),
                              pack2<__half>(values[2] * to_half[1], values[3] * to_half[1]),
                              pack2<__half>(values[4] * to_half[0], values[5] * to_half[0]),
                              pack2<__half>(values[6] * to_half[1], values[7] * to_half[1])),
                   policy);
    }
  }
  *reinterpret_cast<float2*>(params.partial_scale + partial_scale_offset(tile, group, side) + lane * 2) =
      make_float2(scale[0], scale[1]);
  if (has_rows && lane % 4 == 0) {
    // No sum is a logarithm of -inf.
    *reinterpret_cast<float2*>(params.partial_lse + tile * kRowTile + group * 16 + lane / 4 * 2) =
        make_float2(reference[0] + log2f(sum[0]), reference[1] + log2f(sum[1]));
  }
}

}  // namespace flash_mla::inline device
