// Numbers: base-2 exponentials and logarithms, packing of float pairs into the 16-bit formats.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace flash_mla::inline device {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
// Stands for the logarithm of a sum without a key: finite, so that differences are numbers, and far below any other.
constexpr float kNoKeyLse = -1e38f;

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Two floats, rounded to nearest even, the first in the low half.
template <class T>
__device__ __forceinline__ uint32_t pack2(float low, float high) {
  uint32_t packed;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  } else {
    static_assert(std::is_same_v<T, __half>);
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  }
  return packed;
}

// The other way round.
template <class T>
__device__ __forceinline__ float2 unpack2(uint32_t packed) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xffff0000));
  } else {
    static_assert(std::is_same_v<T, __half>);
    return __half22float2(*reinterpret_cast<const __half2*>(&packed));
  }
}

// Transposes a 4 x 4 matrix of words that the four lanes of a quad hold by rows: lane t gets column t.
__device__ __forceinline__ void transpose_quad(uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t send0 = odd ? w[0] : w[1], send1 = odd ? w[2] : w[3];
  send0 = __shfl_xor_sync(~0u, send0, 1);
  send1 = __shfl_xor_sync(~0u, send1, 1);
  if (odd) {
    w[0] = send0;
    w[2] = send1;
  } else {
    w[1] = send0;
    w[3] = send1;
  }
  send0 = high ? w[0] : w[2];
  send1 = high ? w[1] : w[3];
  send0 = __shfl_xor_sync(~0u, send0, 2);
  send1 = __shfl_xor_sync(~0u, send1, 2);
  if (high) {
    w[0] = send0;
    w[1] = send1;
  } else {
    w[2] = send0;
    w[3] = send1;
  }
}

// The same of several, whose shuffles come one behind the other, so that they do not wait for each other.
template <int kMatrices>
__device__ __forceinline__ void transpose_quads(uint32_t (&w)[kMatrices][4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  uint32_t got[kMatrices][2];
#pragma unroll
  for (int i = 0; i < kMatrices; ++i) {
    got[i][0] = __shfl_xor_sync(~0u, odd ? w[i][0] : w[i][1], 1);
    got[i][1] = __shfl_xor_sync(~0u, odd ? w[i][2] : w[i][3], 1);
  }
#pragma unroll
  for (int i = 0; i < kMatrices; ++i) {
    w[i][0] = odd ? got[i][0] : w[i][0];
    w[i][1] = odd ? w[i][1] : got[i][0];
    w[i][2] = odd ? got[i][1] : w[i][2];
    w[i][3] = odd ? w[i][3] : got[i][1];
    got[i][0] = __shfl_xor_sync(~0u, high ? w[i][0] : w[i][2], 2);
    got[i][1] = __shfl_xor_sync(~0u, high ? w[i][1] : w[i][3], 2);
  }
#pragma unroll
  for (int i = 0; i < kMatrices; ++i) {
    w[i][0] = high ? got[i][0] : w[i][0];
    w[i][1] = high ? got[i][1] : w[i][1];
    w[i][2] = high ? w[i][2] : got[i][0];
    w[i][3] = high ? w[i][3] : got[i][1];
  }
}

}  // namespace flash_mla::inline device
