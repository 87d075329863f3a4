// How rows become operands: half-precision fragments from the bytes as they are in memory.
//
// As rows of the output's products, values are multiplied by their scales times 2^-exponent, where the row's own
// exponent makes its largest scale 2^6 to 2^7: then 448, the largest e4m3, times that scale is a half, and scales 2^20
// below it still are normal numbers. The exponent goes into the row's probabilities. A float32 scale is the sum of two
// halves, so that a product with it is rounded once; the other scales need no rounding at all.
//
// As rows of the scores' products they are the same where scales are no float32. Float32 scales belong to 128 columns;
// there values have no scale, and the scores so far are divided by the scale of the columns to come.
//
// The warp that scores a row stores what all need of the scales over them.
#pragma once

#include <cuda_fp16.h>

#include "device/dequantize.cuh"
#include "device/softmax.cuh"
#include "sm90/sparse_attention_few_heads/config.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

__device__ __forceinline__ __half2 as_half2(uint32_t bits) { return reinterpret_cast<const __half2&>(bits); }
__device__ __forceinline__ uint32_t bits_of(__half2 pair) { return reinterpret_cast<const uint32_t&>(pair); }
__device__ __forceinline__ uint32_t times(uint32_t x, uint32_t y) { return bits_of(__hmul2(as_half2(x), as_half2(y))); }

// 2^exponent, for -126 to 127, and the exponent of a number.
__device__ __forceinline__ float power_of_two(int exponent) { return __uint_as_float((exponent + 127) << 23); }
__device__ __forceinline__ int exponent_of(float x) { return static_cast<int>(__float_as_uint(x) >> 23 & 0xff) - 127; }

// Two e4m3 values each.
__device__ __forceinline__ void e4m3x4_to_halves(uint32_t bytes, uint32_t& low, uint32_t& high) {
  asm("{\n.reg .b16 a, b;\nmov.b32 {a, b}, %2;\ncvt.rn.f16x2.e4m3x2 %0, a;\ncvt.rn.f16x2.e4m3x2 %1, b;\n}"
      : "=r"(low), "=r"(high)
      : "r"(bytes));
}

// The e2m1 values in bits 0 to 3 and 16 to 19, times 2^-14: what the bits of the magnitude mean at bits 9 to 11.
__device__ __forceinline__ uint32_t e2m1x2_to_halves(uint32_t nibbles) {
  return (nibbles & 0x00080008) << 12 | (nibbles & 0x00070007) << 9;
}

constexpr int kScaleExponent = 6;  // of a row's largest scale, and at the most of its RoPE values with 8 more
constexpr int kRopeExponent = 14;
constexpr int kMostExponent = 100;  // of a row, either way

__device__ __forceinline__ int clamped_exponent(int exponent) {
  return min(max(exponent, -kMostExponent), kMostExponent);
}

// The scales of two neighbouring operands; `low` where they are sums of two halves.
struct ScalePair {
  uint32_t high, low;
};

// What a lane knows of a row that it scores.
struct PreparedRow {
  int exponent;
  float step;    // float32 scales: the quotient of the scale before the lane's, of four, and the lane's
  float factor;  // of the row's scores
  bool sums;     // float32 scales: the lane's is no half
};

// Scales as they are kept: float32 as two halves, ue8m0 as the upper byte of a half, e4m3 as it is.
template <KVFormat kFormat>
struct Scales {
  static constexpr KVLayout kLayout = layout_of(kFormat);
  static constexpr int kOffset = kLayout.value_bytes();
  static constexpr int kPerQuadLane = kLayout.num_scales() / 4;

  // The four lanes of a quad call it together, `t` is the lane's number in it. `rope_exponent`: that of the largest
  // RoPE value which is one of the values.
  static __device__ __forceinline__ PreparedRow prepare(unsigned char* row, int t, int rope_exponent) {
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      float* const place = reinterpret_cast<float*>(row + kOffset) + t;
      const float scale = *place, largest = quad_max(fabsf(scale));
      const int exponent = clamped_exponent(exponent_of(largest) - kScaleExponent);
      const float relative = scale * power_of_two(-exponent);
      const __half high = __float2half_rn(relative), low = __float2half_rn(relative - __half2float(high));
      *reinterpret_cast<__half2*>(place) = __halves2half2(high, low);
      // No division by zero, no overflow: what is less than 2^-60, or than that of another scale, counts as that.
      const float least = fmaxf(largest, 1.0f) * 0x1p-60f, divisor = fabsf(scale) < least ? least : scale;
      const float before = __shfl_up_sync(~0u, divisor, 1);
      return {exponent, __fdividef(t == 0 ? 1.0f : before, divisor), __shfl_sync(~0u, divisor, 3, 4),
              (__half_as_ushort(low) & 0x7fff) != 0};
    } else if constexpr (kFormat == KVFormat::kModel1) {
      auto* const place = reinterpret_cast<uint16_t*>(row + kOffset) + t;
      const uint32_t bytes = t == 3 ? *place & 0xff : *place;  // the eighth byte is no scale
      int largest = max(bytes & 0xff, bytes >> 8) - 127 - kScaleExponent;
      largest = max(largest, rope_exponent - kRopeExponent);
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      const int exponent = clamped_exponent(max(largest, __shfl_xor_sync(~0u, largest, 2)));
      *place = encode(bytes & 0xff, exponent) | encode(bytes >> 8, exponent) << 8;
      if (t == 0) {
        *reinterpret_cast<float*>(row + kOffset + 8) = power_of_two(-exponent);
      }
      return {exponent, 1, power_of_two(exponent), false};
    } else if constexpr (kLayout.scale == ScaleType::kUe8m0) {
      static_assert(kPerQuadLane == 4);
      uint32_t* const place = reinterpret_cast<uint32_t*>(row + kOffset) + t;
      const uint32_t bytes = *place, pairs = __vmaxu2(bytes & 0x00ff00ff, bytes >> 8 & 0x00ff00ff);
      int largest = max(pairs & 0xffff, pairs >> 16);
      largest = max(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = max(largest, __shfl_xor_sync(~0u, largest, 2));
      const int exponent = clamped_exponent(largest - 127 - kScaleExponent);
      uint32_t encoded = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        encoded |= encode(bytes >> (8 * i) & 0xff, exponent) << (8 * i);
      }
      *place = encoded;
      return {exponent, 1, power_of_two(exponent), false};
    } else {
      return {kE2m1Exponent, 1, power_of_two(kE2m1Exponent), false};
    }
  }

  // The scale of a column of a row, twice; not of float32 scales.
  static __device__ __forceinline__ uint32_t of_row(const unsigned char* row, int column) {
    const unsigned char* const place = at(row, column);
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      return 0;
    } else if constexpr (kLayout.scale == ScaleType::kUe8m0) {
      return *place * 0x01000100u;
    } else {
      return e4m3_pair(*place, *place);
    }
  }

  // The scale of a column of a row as it is kept, and those of two rows side by side.
  static __device__ __forceinline__ uint32_t load(const unsigned char* row, int column) {
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      return *reinterpret_cast<const uint32_t*>(at(row, column));
    } else {
      return *at(row, column);
    }
  }
  static __device__ __forceinline__ ScalePair pair(uint32_t first, uint32_t second) {
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      return {__byte_perm(first, second, 0x5410), __byte_perm(first, second, 0x7632)};
    } else if constexpr (kLayout.scale == ScaleType::kUe8m0) {
      return {first << 8 | second << 24, 0};
    } else {
      return {e4m3_pair(first, second), 0};
    }
  }

  // `kSums`: the scales have low halves.
  template <bool kSums>
  static __device__ __forceinline__ uint32_t scaled(uint32_t halves, const ScalePair& scales) {
    if constexpr (kSums) {
      return bits_of(__hfma2(as_half2(halves), as_half2(scales.high), __hmul2(as_half2(halves), as_half2(scales.low))));
    }
    return times(halves, scales.high);
  }

  // 2^-exponent of a MODEL1 row, for its RoPE columns.
  static __device__ __forceinline__ float inverse(const unsigned char* row) {
    static_assert(kFormat == KVFormat::kModel1);
    return *reinterpret_cast<const float*>(row + kOffset + 8);
  }

 private:
  // e2m1 arrives times 2^-14; scales times 2^7 make all products exact.
  static constexpr int kE2m1Exponent = 7;

  static __device__ __forceinline__ const unsigned char* at(const unsigned char* row, int column) {
    return row + kOffset + column / kLayout.group * (kLayout.scale == ScaleType::kFloat32 ? 4 : 1);
  }

  static __device__ __forceinline__ uint32_t e4m3_pair(uint32_t first, uint32_t second) {
    uint32_t pair, unused;
    e4m3x4_to_halves(first | second << 8, pair, unused);
    return times(pair, 0x58005800);
  }

  // The upper byte of the half 2^(byte - 127 - exponent): 0 where that is no normal number, infinity for 255.
  static __device__ __forceinline__ uint32_t encode(uint32_t byte, int exponent) {
    return min(max(static_cast<int>(byte) - 127 - exponent + 15, 0), 31) << 2;
  }
};

// The rows of the scores' products. A lane has 16 consecutive columns of a row at a time: four steps of the products.
template <KVFormat kFormat>
struct ScoreOperand {
  static constexpr KVLayout kLayout = layout_of(kFormat);

  static __device__ __forceinline__ uint4 load(const unsigned char* row, int column) {
    if constexpr (kLayout.value_bits == 8) {
      return *reinterpret_cast<const uint4*>(row + column);
    } else {
      const uint2 words = *reinterpret_cast<const uint2*>(row + column / 2);
      return make_uint4(words.x, words.y, 0, 0);
    }
  }

  // Words 0 and 2 (of the first row; 1 and 3 of the second) of the fragments of two steps, the first or the last of
  // the four.
  static __device__ __forceinline__ void convert(const uint4& raw, int half, uint32_t scale, uint32_t* fragments) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t low, high;
      if constexpr (kLayout.value_bits == 8) {
        e4m3x4_to_halves(words[half * 2 + step], low, high);
      } else {
        const uint32_t nibbles = words[half] >> (step * 16);
        low = e2m1x2_to_halves((nibbles & 0xf) | (nibbles & 0xf0) << 12);
        high = e2m1x2_to_halves((nibbles >> 8 & 0xf) | (nibbles & 0xf000) << 4);
      }
      constexpr bool kScaled = kLayout.scale != ScaleType::kFloat32;
      fragments[4 * step] = kScaled ? times(low, scale) : low;
      fragments[4 * step + 2] = kScaled ? times(high, scale) : high;
    }
  }
};

// The values as rows of the output's products: a lane has 4 consecutive columns, two of each of two products, of two
// neighbouring keys: words 0 and 1 of the fragments (or, of keys 8 further, 2 and 3).
template <KVFormat kFormat>
struct ValueOperand {
  static constexpr KVLayout kLayout = layout_of(kFormat);

  // The bytes of four columns of a row.
  static __device__ __forceinline__ uint32_t load(const unsigned char* row, int column) {
    if constexpr (kLayout.value_bits == 8) {
      return *reinterpret_cast<const uint32_t*>(row + column);
    } else {
      return *reinterpret_cast<const uint16_t*>(row + column / 2);
    }
  }

  // Four columns, of two products.
  template <bool kSums>
  static __device__ __forceinline__ void convert(uint32_t x, uint32_t y, const ScalePair& scales, uint32_t* fragments) {
    if constexpr (kLayout.value_bits == 8) {
#pragma unroll
      for (int product = 0; product < 2; ++product) {
        uint32_t even, odd;
        e4m3x4_to_halves(__byte_perm(x, y, product ? 0x7362 : 0x5140), even, odd);
        fragments[4 * product] = Scales<kFormat>::template scaled<kSums>(even, scales);
        fragments[4 * product + 1] = Scales<kFormat>::template scaled<kSums>(odd, scales);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t nibbles = (x >> (4 * i) & 0xf) | (y >> (4 * i) & 0xf) << 16;
        fragments[i / 2 * 4 + i % 2] = Scales<kFormat>::template scaled<kSums>(e2m1x2_to_halves(nibbles), scales);
      }
    }
  }

  // The same of columns that are bfloat16, times a power of two for each key.
  static __device__ __forceinline__ void convert_rope(const uint2& first, const uint2& second, float first_factor,
                                                      float second_factor, uint32_t* fragments) {
    const uint32_t x[2] = {first.x, first.y}, y[2] = {second.x, second.y};
#pragma unroll
    for (int product = 0; product < 2; ++product) {
      fragments[4 * product] = pack2<__half>(__uint_as_float(x[product] << 16) * first_factor,
                                             __uint_as_float(y[product] << 16) * second_factor);
      fragments[4 * product + 1] = pack2<__half>(__uint_as_float(x[product] & 0xffff0000) * first_factor,
                                                 __uint_as_float(y[product] & 0xffff0000) * second_factor);
    }
  }
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
