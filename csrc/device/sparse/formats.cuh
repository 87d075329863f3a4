// How the rows of each cache format become bfloat16 tiles. A warp converts one key at a time, 16 values a lane: a unit.
// The scales of a row are spread over four lanes, those of a quarter of its columns each.
#pragma once

#include "core/kv_format.h"
#include "device/copy.cuh"
#include "device/dequantize.cuh"
#include "device/sparse/pieces.cuh"

namespace flash_mla::inline device {

// The scales of a quarter of a row, as they are in memory.
struct QuarterScales {
  uint32_t low, high;  // high: where there are eight
};

// A scale by what it is in memory.
template <ScaleType kScale>
__device__ __forceinline__ float scale_of_bits(uint32_t bits) {
  if constexpr (kScale == ScaleType::kNone) {
    return 1;
  } else if constexpr (kScale == ScaleType::kFloat32) {
    return __uint_as_float(bits);
  } else {
    return kScale == ScaleType::kE4m3 ? e4m3_to_float(bits) : ue8m0_to_float(bits);
  }
}

template <KVFormat kFormat>
struct RowFormat {
  static constexpr KVLayout kLayout = layout_of(kFormat);
  static constexpr int kUnitBytes = 16 * kLayout.value_bits / 8;
  static constexpr int kQuarterScales = 128 / kLayout.group;  // of a row
  static constexpr bool kWideScales = kLayout.scale == ScaleType::kE4m3;

  // Sixteen values, without a branch around the instruction: `raw` stays as it is where they are not wanted.
  static __device__ __forceinline__ void load(const unsigned char* row, int unit, bool wanted, uint4& raw) {
    const unsigned char* source = row + unit * kUnitBytes;
    if constexpr (kUnitBytes == 16) {
      load_words_if(wanted, source, raw);
    } else {
      asm volatile(
          "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %3, 0;\n"
          "@wanted ld.global.L1::no_allocate.v2.u32 {%0, %1}, [%2];\n}"
          : "+r"(raw.x), "+r"(raw.y)
          : "l"(source), "r"(static_cast<int>(wanted)));
    }
  }

  // The scales of a quarter of a row, whose scales begin at `scales`.
  static __device__ __forceinline__ QuarterScales load_scales(const unsigned char* scales, int quarter) {
    QuarterScales found{};
    if constexpr (kLayout.scale == ScaleType::kNone) {
      return found;
    } else if constexpr (kFormat == KVFormat::kModel1) {
      uint16_t pair;
      asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(pair) : "l"(scales + 2 * quarter));
      found.low = pair;
    } else if constexpr (kWideScales) {
      asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];"
                   : "=r"(found.low), "=r"(found.high)
                   : "l"(scales + 8 * quarter));
    } else {
      asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(found.low) : "l"(scales + 4 * quarter));
    }
    return found;
  }

  // The scale of a lane's unit, from the lane that has those of its quarter of the row.
  static __device__ __forceinline__ float scale(const QuarterScales& scales, int from, int unit) {
    if constexpr (kLayout.scale == ScaleType::kNone) {
      return 1;
    }
    const uint32_t low = __shfl_sync(~0u, scales.low, from);
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      return __uint_as_float(low);
    } else if constexpr (kWideScales) {
      const uint32_t high = __shfl_sync(~0u, scales.high, from);
      return e4m3_to_float((unit % 8 < 4 ? low : high) >> (unit % 4 * 8) & 0xff);
    } else {
      return ue8m0_to_float(low >> (unit % 8 * kQuarterScales / 8 * 8) & 0xff);
    }
  }

  // The same where the row's scales lie in shared memory.
  static __device__ __forceinline__ float scale(const unsigned char* scales, int unit) {
    const int index = unit / (kLayout.group / 16);
    if constexpr (kLayout.scale == ScaleType::kNone) {
      return 1;
    } else {
      return scale_of_bits<kLayout.scale>(
          kLayout.scale == ScaleType::kFloat32 ? reinterpret_cast<const uint32_t*>(scales)[index] : scales[index]);
    }
  }

  // Eight of the sixteen values.
  static __device__ __forceinline__ uint4 eight_of(const uint4& raw, float scale, bool second) {
    if constexpr (kLayout.value_bits == 8) {
      return eight(second ? raw.z : raw.x, second ? raw.w : raw.y, scale);
    } else {
      return scale_e2m1x8(second ? raw.y : raw.x, scale);
    }
  }

  // Sixteen values into the 16-byte units at `first` and `second`; the second eight first where `swapped`.
  static __device__ __forceinline__ void convert(const uint4& raw, float scale, bool swapped, uint32_t first,
                                                 uint32_t second) {
    store_words(first, eight_of(raw, scale, swapped));
    store_words(second, eight_of(raw, scale, !swapped));
  }

 private:
  static __device__ __forceinline__ uint4 eight(uint32_t low, uint32_t high, float scale) {
    const uint2 a = scale_e4m3x4(low, scale), b = scale_e4m3x4(high, scale);
    return make_uint4(a.x, a.y, b.x, b.y);
  }
};

// Kernels are for one format, or for one of each source.
template <class C>
constexpr bool kTwoFormats = C::kExtraFormat != KVFormat::kNone && C::kExtraFormat != C::kFormat;

// Calls `function` with the format of the entry's source.
template <class C, template <KVFormat> class Format = RowFormat, class Function>
__device__ __forceinline__ void with_format(const Entry& entry, Function&& function) {
  if (kTwoFormats<C> && entry.source()) {
    function(Format<kTwoFormats<C> ? C::kExtraFormat : C::kFormat>());
  } else {
    function(Format<C::kFormat>());
  }
}

}  // namespace flash_mla::inline device
