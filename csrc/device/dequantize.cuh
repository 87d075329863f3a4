// From the bytes of quantised KV caches to bfloat16: value * scale in float32, rounded once.
#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "device/numeric.cuh"

namespace flash_mla::inline device {

// A ue8m0 byte e means 2^(e - 127); 255 becomes +inf.
__device__ __forceinline__ float ue8m0_to_float(uint32_t byte) {
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23);
}

__device__ __forceinline__ float e4m3_to_float(uint32_t byte) {
  const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(byte), __NV_E4M3);
  return __half2float(__half(half));
}

// Two half-precision values times `scale`.
__device__ __forceinline__ uint32_t scale_pair(uint32_t halves, float scale) {
  const float2 pair = __half22float2(reinterpret_cast<const __half2&>(halves));
  return pack2<__nv_bfloat16>(pair.x * scale, pair.y * scale);
}

// Four e4m3 values to four bfloat16.
__device__ __forceinline__ uint2 scale_e4m3x4(uint32_t bytes, float scale) {
  uint32_t low, high;
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
  return make_uint2(scale_pair(low, scale), scale_pair(high, scale));
}

// Eight e2m1 values, the first in the lowest bits, to eight bfloat16. As half precision the three bits of the magnitude
// at bits 9 to 11 are the value times 2^-14, subnormals included.
__device__ __forceinline__ uint4 scale_e2m1x8(uint32_t nibbles, float scale) {
  const float raised = scale * 16384.0f;
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t byte = nibbles >> (8 * i);
    const uint32_t pair = (byte & 0xf) | (byte & 0xf0) << 12;
    words[i] = scale_pair((pair & 0x00080008) << 12 | (pair & 0x00070007) << 9, raised);
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

}  // namespace flash_mla::inline device
