// The numbers of KV caches: bfloat16 to e4m3 and e2m1 with the scale of their group, and back. The bits are those of
// flash_mla/backends/reference_kv_cache.py. Nothing here knows of threads or memory, and all of it runs on the host
// too, so that each function can be compared with the reference over all of its inputs without a GPU.
//
// Values come in chunks of eight, as pairs: two bfloat16 in a word, the first in the low half. Magnitudes are the bits
// of a non-negative float32, which are ordered as the numbers are.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <bit>
#include <cstdint>

#include "core/kv_format.h"

namespace flash_mla::inline device {

constexpr int kChunk = 8;
constexpr int kPairs = kChunk / 2;
constexpr uint32_t kInfinityBits = 0x7F800000;

struct alignas(16) Pairs {
  uint32_t of[kPairs];
};

__host__ __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

__host__ __device__ __forceinline__ float low_value(uint32_t pair) { return std::bit_cast<float>(pair << 16); }

__host__ __device__ __forceinline__ float high_value(uint32_t pair) { return std::bit_cast<float>(pair & 0xFFFF0000); }

// ---- Writing.

__host__ __device__ __forceinline__ __nv_bfloat162 magnitudes(uint32_t pair) {
  return __habs2(__nv_bfloat162(std::bit_cast<__nv_bfloat162_raw>(pair)));
}

// More than kInfinityBits if there is a NaN.
__host__ __device__ __forceinline__ uint32_t largest_magnitude(const Pairs& pairs) {
  const __nv_bfloat162_raw largest = __hmax2_nan(__hmax2_nan(magnitudes(pairs.of[0]), magnitudes(pairs.of[1])),
                                                 __hmax2_nan(magnitudes(pairs.of[2]), magnitudes(pairs.of[3])));
  const uint32_t pair = std::bit_cast<uint32_t>(largest);
  return larger(pair << 16, pair & 0xFFFF0000);
}

// 0 if none is finite.
__host__ __device__ inline uint32_t largest_finite_magnitude(const Pairs& pairs) {
  uint32_t largest = 0;
  for (const uint32_t pair : pairs.of) {
    const uint32_t low = (pair << 16) & 0x7FFF0000, high = pair & 0x7FFF0000;
    largest = larger(largest, larger(low < kInfinityBits ? low : 0, high < kInfinityBits ? high : 0));
  }
  return largest;
}

// NaN is stored as one code, whatever its sign.
__host__ __device__ inline void clear_signs_of_nans(Pairs& pairs) {
  for (uint32_t& pair : pairs.of) {
    pair &= ((pair << 16) & 0x7FFF0000) > kInfinityBits ? ~0x8000u : ~0u;
    pair &= (pair & 0x7FFF0000) > kInfinityBits ? ~0x80000000u : ~0u;
  }
}

// The scale of a group: the bits that are stored, and what a value is multiplied by (an exact scale: divided by).
struct GroupScale {
  uint32_t stored;
  float factor;
};

constexpr float kSmallestScale = 1e-4f;
constexpr int kSmallestExponent = 114;  // of 2 ** ceil(log2(kSmallestScale)), biased by 127

// 127 + ceil(log2(max(magnitude / 448, 1e-4))). 448 is 1.75 * 2 ** 8, so what counts is whether the mantissa is above
// that of 1.75: adding carries into the exponent just then. (A bfloat16 is never so near to 1.75 that the rounded
// quotient would say something else.)
__host__ __device__ __forceinline__ int scale_exponent(uint32_t magnitude) {
  const int exponent = static_cast<int>((magnitude + 0x1FFFFF) >> 23) - 8;
  return exponent > kSmallestExponent ? exponent : kSmallestExponent;
}

__host__ __device__ __forceinline__ float exact_scale(uint32_t magnitude) {
  const float scale = std::bit_cast<float>(magnitude) / 448.0f;
  return scale > kSmallestScale ? scale : kSmallestScale;
}

__host__ __device__ __forceinline__ float e4m3_value(uint32_t code) {
  const __half_raw value = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3);
  return __half2float(__half(value));
}

constexpr float kHalfToE2M1 = 0x1p-14f;  // from float16's exponent bias to that of e2m1
constexpr float kSmallestE4M3 = 0x1p-9f;

// e4m3(magnitude / 6), at least the smallest. The product with a rounded reciprocal is off by 2 ** -23 at most, which
// the rounding to float16 takes away where magnitude / 6 is a midpoint of two codes. Where it is none, it is at least
// 2 ** -9 off one, since magnitude has 8 significant bits and 6 * midpoint has no more.
__host__ __device__ __forceinline__ uint32_t e4m3_scale(uint32_t magnitude) {
  const float share = std::bit_cast<float>(magnitude) * (1 / 6.0f);
  const __half_raw rounded = __float2half_rn(share > kSmallestE4M3 ? share : kSmallestE4M3);
  return __nv_cvt_halfraw_to_fp8(rounded, __NV_SATFINITE, __NV_E4M3);
}

// `magnitude`: the largest finite one of the group.
template <ScaleType kType, bool kExact>
__host__ __device__ __forceinline__ GroupScale scale_of(uint32_t magnitude) {
  if constexpr (kType == ScaleType::kE4m3) {
    const uint32_t code = e4m3_scale(magnitude);
    return {code, 1 / e4m3_value(code) * kHalfToE2M1};
  } else if constexpr (kExact) {
    const float scale = exact_scale(magnitude);
    return {std::bit_cast<uint32_t>(scale), scale};
  } else {
    // The reciprocal of a power of two is exact, and multiplying by it rounds as the division does.
    const int exponent = scale_exponent(magnitude);
    return {static_cast<uint32_t>(kType == ScaleType::kUe8m0 ? exponent : exponent << 23),
            std::bit_cast<float>(static_cast<uint32_t>(254 - exponent) << 23)};
  }
}

// Two e4m3 codes: nearest, ties to even, too large to the largest.
template <bool kExact>
__host__ __device__ __forceinline__ uint32_t e4m3_codes(uint32_t pair, float factor) {
  const float low = low_value(pair), high = high_value(pair);
  const float2 shares = kExact ? float2{low / factor, high / factor} : float2{low * factor, high * factor};
  return __nv_cvt_float2_to_fp8x2(shares, __NV_SATFINITE, __NV_E4M3);
}

// The bits of `ones` where the mask has ones, those of `zeros` elsewhere.
__host__ __device__ __forceinline__ uint32_t bits_of(uint32_t mask, uint32_t ones, uint32_t zeros) {
  return (ones & mask) | (zeros & ~mask);
}

// Two e2m1 codes, in bits 12 to 15 of each half; the bits below are of no meaning. Nearest, ties to even, NaN and too
// large to the largest.
//
// e2m1 is float16 with fewer bits once the exponent's bias is that of float16 (the factor sees to it), subnormal
// numbers included: what is left is to round bits 0 to 8 away. The rounding of the factor does no harm, as in
// `e4m3_scale`: value has 8 significant bits, and midpoint * scale has no more.
__host__ __device__ __forceinline__ uint32_t e2m1_pair(uint32_t pair, float factor) {
  const __half2 shares = __habs2(__floats2half2_rn(low_value(pair) * factor, high_value(pair) * factor));
  const __half2_raw limited = __hmin2(shares, __float2half2_rn(6 * kHalfToE2M1));
  const uint32_t bits = std::bit_cast<uint32_t>(limited);
  const uint32_t rounded = bits + 0x00FF00FF + ((bits >> 9) & 0x00010001);
  return bits_of(0x80008000, pair, rounded << 3);
}

// Eight e2m1 codes, the first in the lowest four bits.
__host__ __device__ __forceinline__ uint32_t e2m1_codes(const Pairs& pairs, float factor) {
  uint32_t of[kPairs];
  for (int i = 0; i < kPairs; ++i) {
    of[i] = e2m1_pair(pairs.of[i], factor);
  }
  // Bytes: the first of pair 0, the first of pair 1, the second of pair 0, the second of pair 1.
  const uint32_t low = bits_of(0x00FF00FF, of[0] >> 12, of[1] >> 4),
                 high = bits_of(0x00FF00FF, of[2] >> 12, of[3] >> 4);
  const uint32_t even = (low & 0xFFFF) | (high << 16), odd = (low >> 16) | (high & 0xFFFF0000);
  return bits_of(0x0F0F0F0F, even, odd << 4);
}

// ---- Reading.

template <ScaleType kType>
__host__ __device__ __forceinline__ float scale_value(uint32_t stored) {
  if constexpr (kType == ScaleType::kFloat32) {
    return std::bit_cast<float>(stored);
  } else if constexpr (kType == ScaleType::kUe8m0) {
    // 2 ** -127 is subnormal: its bits are not those of an exponent.
    return std::bit_cast<float>(stored == 0 ? 1u << 22 : stored << 23);
  } else {
    return e4m3_value(stored);
  }
}

__host__ __device__ __forceinline__ uint32_t scaled(__half2 stored, float scale) {
  const float2 values = __half22float2(stored);
  const __nv_bfloat162_raw pair = __floats2bfloat162_rn(values.x * scale, values.y * scale);
  return std::bit_cast<uint32_t>(pair);
}

// Two e4m3 codes times a scale.
__host__ __device__ __forceinline__ uint32_t e4m3_values(uint32_t codes, float scale) {
  const __half2_raw values = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return scaled(__half2(values), scale);
}

// The two e2m1 codes of the lowest byte times a scale. Their bits as those of float16 are smaller by kHalfToE2M1, which
// the product makes up for: it is exact.
__host__ __device__ __forceinline__ uint32_t e2m1_values(uint32_t codes, float scale) {
  const uint32_t apart = codes | (codes << 12);
  const uint32_t bits = ((apart & 0x00070007) << 9) | ((apart & 0x00080008) << 12);
  return scaled(__half2(std::bit_cast<__half2_raw>(bits)), scale * (1 / kHalfToE2M1));
}

}  // namespace flash_mla::inline device
