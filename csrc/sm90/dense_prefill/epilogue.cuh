// Writing the rows of an item, straight from registers, while the loads of the next item go on.
#pragma once

#include "device/numeric.cuh"
#include "sm90/dense_prefill/storage.h"

namespace flash_mla::sm90::dense_prefill {

// `row` is the first of the thread's two rows of the item, the other is 8 further.
template <class T>
__device__ __forceinline__ void write_rows(const DensePrefillParams& params, const Item& item, int row, int lane,
                                           const float (&output)[kPrefillHeadDimV / 2], const float (&reference)[2],
                                           const float (&sum)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const bool exists = row + 8 * r < item.num_rows, any_key = sum[r] != 0;
    const int64_t token = item.first_token + row + 8 * r;
    const float scale = any_key ? 1.0f / sum[r] : 0.0f;
    T* out = static_cast<T*>(params.out) + (token * params.h_q + item.head) * kPrefillHeadDimV;
#pragma unroll
    for (int i = 0; i < kPrefillHeadDimV / 32; ++i) {  // 32 columns: a quad's four words become four runs of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i * 16 + j * 4 + 2 * r;
        words[j] = pack2<T>(output[at] * scale, output[at + 1] * scale);
      }
      transpose_quad(words, lane);
      if (exists) {
        *reinterpret_cast<uint4*>(out + i * 32 + lane % 4 * 8) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    if (exists && lane % 4 == 0) {
      params.lse[static_cast<int64_t>(item.head) * params.tokens_q + token] =
          any_key ? (reference[r] + log2f(sum[r])) * kLn2 : INFINITY;
    }
  }
}

}  // namespace flash_mla::sm90::dense_prefill
