// Online softmax on the scores of a whole tile: wgmma's accumulator fragment as device/softmax.cuh describes it, of any
// number of columns.
#pragma once

#include "device/softmax.cuh"

namespace flash_mla::sm90::dense_prefill {

// Scores of keys at or past a row's limit become -inf. `limit` counts keys from the tile's start.
template <int kScores>
__device__ __forceinline__ void mask_tile(float (&scores)[kScores], const int (&limit)[2], int lane) {
  const int shifted[2] = {limit[0] - lane % 4 * 2, limit[1] - lane % 4 * 2};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    scores[i] = i / 4 * 8 + i % 2 < shifted[(i / 2) % 2] ? scores[i] : -INFINITY;
  }
}

// The largest score of each of the thread's two rows.
template <int kScores>
__device__ __forceinline__ void tile_maximum(const float (&scores)[kScores], float (&largest)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float a = fmaxf(scores[2 * r], scores[2 * r + 1]), b = fmaxf(scores[4 + 2 * r], scores[4 + 2 * r + 1]);
#pragma unroll
    for (int i = 8; i < kScores; i += 8) {
      a = fmaxf(a, fmaxf(scores[i + 2 * r], scores[i + 2 * r + 1]));
      b = fmaxf(b, fmaxf(scores[i + 4 + 2 * r], scores[i + 4 + 2 * r + 1]));
    }
    largest[r] = quad_max(fmaxf(a, b));
  }
}

// Scores become 2^(scores * scale - reference); adds the rows' parts to `sum` (this thread's columns only).
template <int kScores>
__device__ __forceinline__ void exponentiate_tile(float (&scores)[kScores], float scale, const float (&reference)[2],
                                                  float (&sum)[2]) {
  float partial[2][2] = {};
#pragma unroll
  for (int i = 0; i < kScores; ++i) {
    const int r = (i / 2) % 2;
    scores[i] = exp2_approx(fmaf(scores[i], scale, -reference[r]));
    partial[r][i % 2] += scores[i];
  }
  sum[0] += partial[0][0] + partial[0][1];
  sum[1] += partial[1][0] + partial[1][1];
}

// As A operands of the next product, four words for 16 columns.
template <class T, int kScores>
__device__ __forceinline__ void pack_tile(const float (&scores)[kScores], uint32_t* packed) {
#pragma unroll
  for (int i = 0; i < kScores; i += 2) {
    packed[i / 2] = pack2<T>(scores[i], scores[i + 1]);
  }
}

}  // namespace flash_mla::sm90::dense_prefill
