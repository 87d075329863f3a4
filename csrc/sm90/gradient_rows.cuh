// Writing rows of gradients straight from wgmma's accumulator fragment.
#pragma once

#include "device/numeric.cuh"

namespace flash_mla::sm90 {

// `rows`: the tile's first; `row`: the first of the thread's two rows, the other is 8 further.
template <class T, int kColumns>
__device__ __forceinline__ void write_gradient(T* rows, int64_t stride, int row, int num_rows, int lane, float scale,
                                               const float (&sums)[kColumns / 2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    T* out = rows + (row + 8 * r) * stride + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < kColumns / 32; ++i) {  // 32 columns: a quad's four words become four runs of 8 columns
      uint32_t words[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int at = i * 16 + j * 4 + 2 * r;
        words[j] = pack2<T>(sums[at] * scale, sums[at + 1] * scale);
      }
      transpose_quad(words, lane);
      if (row + 8 * r < num_rows) {
        *reinterpret_cast<uint4*>(out + i * 32) = make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}

}  // namespace flash_mla::sm90
