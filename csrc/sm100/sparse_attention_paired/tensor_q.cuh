// Q in tensor memory: the last slices, A of the scores' products.
#pragma once

#include "device/sm100/tcgen05.cuh"
#include "sm100/sparse_attention_paired/storage.h"

namespace flash_mla::sm100::sparse_attention_paired {

// Which of the CTA's rows a thread of a producer warp stores: a warp reaches a quarter of the lanes, and the lower and
// the upper half of them have the same rows.
__device__ __forceinline__ int row_of_tensor_q(int warp, int lane) { return warp % 2 * 32 + lane; }

// `row`: null for zeros. The warp shares its quarter with one other. What waits for this has to be told behind it.
template <class C>
__device__ __forceinline__ void store_tensor_q(uint32_t tensor_memory, int warp, const unsigned char* row) {
  tcgen05_fence_after();
#pragma unroll 1
  for (int slice = C::kSharedQSlices + warp / 4; slice < C::kSlices; slice += C::kProducerWarps / 4) {
    float registers[32];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float4 unit = make_float4(0, 0, 0, 0);
      if (row != nullptr) {
        unit = __ldg(reinterpret_cast<const float4*>(row + slice * kSliceRowBytes) + i);
      }
      registers[4 * i] = unit.x, registers[4 * i + 1] = unit.y;
      registers[4 * i + 2] = unit.z, registers[4 * i + 3] = unit.w;
    }
    tmem_store_32x32(tensor_memory + tmem_lane(warp % 4 * 32) + C::tensor_q(slice), registers);
  }
  tmem_wait_store();
  tcgen05_fence_before();
}

}  // namespace flash_mla::sm100::sparse_attention_paired
