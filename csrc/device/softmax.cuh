// Online softmax on wgmma's accumulator fragment: 64 x 64 scores in 32 registers a thread. Register i holds row (i / 2)
// % 2 * 8 + lane / 4 of the warp's 16 and column i / 4 * 8 + lane % 4 * 2 + i % 2. All exponents are base 2.
#pragma once

#include "device/numeric.cuh"

namespace flash_mla::inline device {

// Stands for "no key yet": finite, so that differences of references are never NaN, and far below any score.
constexpr float kNoMax = -1.0e38f;

// The reference maximum moves only when a score outgrows it by 2^kSlack: sums stay far from overflow and rescaling the
// output becomes rare.
constexpr float kSlack = 8.0f;

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Scores of keys at or past a row's limit become -inf. `limit` counts keys from the tile's start.
__device__ __forceinline__ void mask_scores(float (&scores)[32], const int (&limit)[2], int lane) {
  // Compared with constants: columns in registers would live through the whole loop.
  const int shifted[2] = {limit[0] - lane % 4 * 2, limit[1] - lane % 4 * 2};
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    scores[i] = i / 4 * 8 + i % 2 < shifted[(i / 2) % 2] ? scores[i] : -INFINITY;
  }
}

// Scores of keys whose bit is not set become -inf; `low` has those of the first 32.
__device__ __forceinline__ void mask_keys(float (&scores)[32], uint32_t low, uint32_t high, int lane) {
  low >>= lane % 4 * 2;
  high >>= lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    const uint32_t word = i < 16 ? low : high;
    scores[i] = word >> (i / 4 % 4 * 8 + i % 2) & 1 ? scores[i] : -INFINITY;
  }
}

// The largest of the lane's scores of each of its two rows.
__device__ __forceinline__ void lane_maximum(const float (&scores)[32], float (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = fmaxf(scores[2 * r], scores[2 * r + 1]), b = fmaxf(scores[4 + 2 * r], scores[4 + 2 * r + 1]);
#pragma unroll
    for (int i = 8; i < 32; i += 8) {
      a = fmaxf(a, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
      b = fmaxf(b, fmaxf(scores[i + 4 + 2 * r], scores[i + 4 + 2 * r + 1]));
    }
    largest[r] = fmaxf(a, b);
  }
}

// The largest score of each of the lane's two rows.
__device__ __forceinline__ void row_maximum(const float (&scores)[32], float (&largest)[2]) {
  lane_maximum(scores, largest);
  largest[0] = quad_max(largest[0]);
  largest[1] = quad_max(largest[1]);
}

// 2^(scores * scale - reference) of columns 16 kFirst to 16 (kFirst + kCount) - 1, packed as A operands of the next
// product, one for 16 columns; adds the row's part to `sum` (this thread's columns only).
template <class T, int kFirst, int kCount>
__device__ __forceinline__ void exponentiate(const float (&scores)[32], float scale, const float (&reference)[2],
                                             float (&sum)[2], uint32_t (&packed)[4 * kCount]) {
  float partial[2][2] = {};
#pragma unroll
  for (int i = 0; i < 8 * kCount; i += 2) {
    const int r = (i / 2) % 2;
    const float x = exp2_approx(fmaf(scores[8 * kFirst + i], scale, -reference[r])),
                y = exp2_approx(fmaf(scores[8 * kFirst + i + 1], scale, -reference[r]));
    partial[r][0] += x;
    partial[r][1] += y;
    packed[i / 2] = pack2<T>(x, y);
  }
  sum[0] += partial[0][0] + partial[0][1];
  sum[1] += partial[1][0] + partial[1][1];
}

}  // namespace flash_mla::inline device
