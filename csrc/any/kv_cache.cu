// Rows of bfloat16 into slots of a paged cache, quantised, and all slots of a cache back. One warp a row.
//
// Lane l has the chunks l, l + 32, ... of a row, of eight values each: 16 bytes as bfloat16, so that a warp moves runs
// of 512 bytes on that side and of 256 (e4m3) or 128 (e2m1) in the cache. The lanes of a group of values are neighbours
// within one such step. Whatever a row needs is loaded before the first of it is stored.
#include <cuda_runtime.h>

#include <type_traits>

#include "any/kernels.h"
#include "core/schedule.h"
#include "device/kv_quantize.cuh"
#include "device/launch.h"

namespace flash_mla {
namespace {

constexpr int kWarps = 8;
constexpr int64_t kMaxCtas = 1 << 20;

template <KVFormat kFormat>
struct RowShape {
  static constexpr KVLayout kLayout = layout_of(kFormat);
  static constexpr ScaleType kScale = kLayout.scale;
  static constexpr int kValueBits = kLayout.value_bits;
  static constexpr int kChunks = kLayout.d_qk / kChunk;
  static constexpr int kQuantised = kLayout.values / kChunk;  // chunks, in front of those of RoPE
  static constexpr int kSteps = ceil_div(kChunks, 32);
  static constexpr int kLanes = kLayout.group / kChunk;  // of a group
  static constexpr int kChunkBytes = kChunk * kValueBits / 8;
  static constexpr int kRopeOffset = kLayout.rope_offset();
  static constexpr bool kScalesBehindPage = kLayout.scales_behind_page;
  static constexpr int kNumScales = kLayout.num_scales();
  using Codes = std::conditional_t<kChunkBytes == 8, uint2, uint32_t>;
  using Scale = std::conditional_t<kScale == ScaleType::kFloat32, uint32_t, uint8_t>;
  static_assert(kQuantised % kLanes == 0 && 32 % kLanes == 0 && sizeof(Codes) == kChunkBytes);
  static_assert(!kScalesBehindPage || kLayout.scale_stride() == kNumScales + 1);  // a byte of padding
};

struct CacheRow {
  uint8_t* values;
  uint8_t* scales;
};

template <KVFormat kFormat>
__device__ CacheRow row_of(const KVCacheParams& params, int64_t slot) {
  constexpr KVLayout kLayout = layout_of(kFormat);
  const uint64_t page = static_cast<uint64_t>(slot) / static_cast<uint64_t>(params.page);
  const int64_t offset = slot - static_cast<int64_t>(page) * params.page;
  uint8_t* const base = params.cache + static_cast<int64_t>(page) * params.stride_page;
  if constexpr (kLayout.scales_behind_page) {
    return {base + offset * kLayout.row_stride(),
            base + params.page * kLayout.row_stride() + offset * kLayout.scale_stride()};
  } else {
    uint8_t* const values = base + offset * params.stride_token;
    return {values, values + kLayout.value_bytes()};
  }
}

// Negative for what is no slot of the cache.
__device__ int64_t slot_of(const KVCacheParams& params, int64_t row) {
  const int64_t at = row * params.stride_slot;
  const int64_t slot = params.slots_are_int64 ? static_cast<const int64_t*>(params.slots)[at]
                                              : static_cast<const int32_t*>(params.slots)[at];
  return slot < params.num_slots ? slot : -1;
}

template <class T>
__device__ T& at(void* memory, int64_t bytes) {
  return *reinterpret_cast<T*>(static_cast<uint8_t*>(memory) + bytes);
}

template <bool kAligned>
__device__ Pairs load_pairs(const uint16_t* values) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pairs*>(values);
  } else {
    Pairs pairs;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      pairs.of[i] = values[2 * i] | (static_cast<uint32_t>(values[2 * i + 1]) << 16);
    }
    return pairs;
  }
}

// The codes of a lane's chunk, and the scale of its group as it is stored. All lanes of the warp take part.
template <KVFormat kFormat, bool kExact>
__device__ typename RowShape<kFormat>::Codes quantize(Pairs pairs, int lane, uint32_t& stored_scale) {
  using Row = RowShape<kFormat>;
  uint32_t largest = largest_magnitude(pairs);
  const bool has_nan = largest > kInfinityBits;
  if (largest >= kInfinityBits) {
    largest = largest_finite_magnitude(pairs);
    clear_signs_of_nans(pairs);
  }
#pragma unroll
  for (int step = Row::kLanes / 2; step > 0; step /= 2) {
    largest = larger(largest, __shfl_xor_sync(~0u, largest, step));
  }
  const GroupScale scale = scale_of<Row::kScale, kExact>(largest);
  stored_scale = scale.stored;
  if constexpr (Row::kValueBits == 8) {
    return {e4m3_codes<kExact>(pairs.of[0], scale.factor) | e4m3_codes<kExact>(pairs.of[1], scale.factor) << 16,
            e4m3_codes<kExact>(pairs.of[2], scale.factor) | e4m3_codes<kExact>(pairs.of[3], scale.factor) << 16};
  } else {
    constexpr uint32_t kNan = 0x7F;  // e2m1 has none: the scale says it for the whole group
    const uint32_t lanes_of_group = ((1u << Row::kLanes) - 1) << (lane / Row::kLanes * Row::kLanes);
    stored_scale = __ballot_sync(~0u, has_nan) & lanes_of_group ? kNan : stored_scale;
    return e2m1_codes(pairs, scale.factor);
  }
}

template <KVFormat kFormat, bool kExact, bool kAligned>
__global__ void __launch_bounds__(32 * kWarps) append_kernel(const __grid_constant__ KVCacheParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  using Row = RowShape<kFormat>;
  const int lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < params.num_rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t slot = slot_of(params, row);
    const uint16_t* const values = params.rows + row * params.stride_row;
    Pairs pairs[Row::kSteps] = {};
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const int chunk = 32 * step + lane;
      if (chunk < Row::kChunks) {
        pairs[step] = load_pairs<kAligned>(values + kChunk * chunk);
      }
    }
    typename Row::Codes codes[Row::kSteps];
    uint32_t scales[Row::kSteps];
#pragma unroll
    for (int step = 0; 32 * step < Row::kQuantised; ++step) {
      codes[step] = quantize<kFormat, kExact>(pairs[step], lane, scales[step]);
    }
    // Only now, so that nothing waits for the slot.
    if (slot < 0) {
      continue;
    }
    const CacheRow place = row_of<kFormat>(params, slot);
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const int chunk = 32 * step + lane;
      if (chunk < Row::kQuantised) {
        at<typename Row::Codes>(place.values, chunk * Row::kChunkBytes) = codes[step];
        if (lane % Row::kLanes == 0) {
          at<typename Row::Scale>(place.scales, chunk / Row::kLanes * sizeof(typename Row::Scale)) =
              static_cast<typename Row::Scale>(scales[step]);
        }
      } else if (chunk < Row::kChunks) {
        const int rope_chunk = chunk - Row::kQuantised;
        at<Pairs>(place.values, Row::kRopeOffset + rope_chunk * sizeof(Pairs)) = pairs[step];
        if (Row::kScalesBehindPage && rope_chunk == 0) {
          place.scales[Row::kNumScales] = 0;  // padding
        }
      }
    }
  }
}

template <KVFormat kFormat>
__global__ void __launch_bounds__(32 * kWarps) dequantize_kernel(const __grid_constant__ KVCacheParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  using Row = RowShape<kFormat>;
  const int lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < params.num_rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const CacheRow place = row_of<kFormat>(params, row);
    Pairs pairs[Row::kSteps];
    typename Row::Codes codes[Row::kSteps];
    uint32_t scales[Row::kSteps];
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const int chunk = 32 * step + lane;
      if (chunk < Row::kQuantised) {
        codes[step] = at<typename Row::Codes>(place.values, chunk * Row::kChunkBytes);
        scales[step] = at<typename Row::Scale>(place.scales, chunk / Row::kLanes * sizeof(typename Row::Scale));
      } else if (chunk < Row::kChunks) {
        const int rope_chunk = chunk - Row::kQuantised;
        pairs[step] = at<Pairs>(place.values, Row::kRopeOffset + rope_chunk * sizeof(Pairs));
      }
    }
    uint16_t* const values = params.rows + row * params.stride_row;
#pragma unroll
    for (int step = 0; step < Row::kSteps; ++step) {
      const int chunk = 32 * step + lane;
      if (chunk < Row::kQuantised) {
        const float scale = scale_value<Row::kScale>(scales[step]);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
          if constexpr (Row::kValueBits == 8) {
            const uint32_t word = i < 2 ? codes[step].x : codes[step].y;
            pairs[step].of[i] = e4m3_values((word >> (16 * (i % 2))) & 0xFFFF, scale);
          } else {
            pairs[step].of[i] = e2m1_values((codes[step] >> (8 * i)) & 0xFF, scale);
          }
        }
      }
      if (chunk < Row::kChunks) {
        at<Pairs>(values, chunk * sizeof(Pairs)) = pairs[step];
      }
    }
  }
}

// BF16: nothing is quantised, and a row may have any length and address.
template <class Word, bool kAppend>
__global__ void __launch_bounds__(32 * kWarps) copy_kernel(const __grid_constant__ KVCacheParams params) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  constexpr int kBatch = 4;
  const int lane = threadIdx.x % 32;
  const int words = params.d_qk * static_cast<int>(sizeof(uint16_t)) / static_cast<int>(sizeof(Word));
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < params.num_rows;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t slot = kAppend ? slot_of(params, row) : row;
    if (slot < 0) {
      continue;
    }
    Word* const cached = reinterpret_cast<Word*>(row_of<KVFormat::kBf16>(params, slot).values);
    Word* const outside = reinterpret_cast<Word*>(params.rows + row * params.stride_row);
    const Word* const from = kAppend ? outside : cached;
    Word* const to = kAppend ? cached : outside;
    for (int first = lane; first < words; first += 32 * kBatch) {
      Word batch[kBatch] = {};
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + 32 * i < words) {
          batch[i] = from[first + 32 * i];
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        if (first + 32 * i < words) {
          to[first + 32 * i] = batch[i];
        }
      }
    }
  }
}

using Kernel = void (*)(KVCacheParams);

template <bool kAligned>
Kernel append_kernel_for(const KVCacheParams& params) {
  using enum KVFormat;
  switch (params.format) {
    case kV32:
      return params.exact_scale ? append_kernel<kV32, true, kAligned> : append_kernel<kV32, false, kAligned>;
    case kV32NoRope:
      return params.exact_scale ? append_kernel<kV32NoRope, true, kAligned>
                                : append_kernel<kV32NoRope, false, kAligned>;
    case kModel1:
      return append_kernel<kModel1, false, kAligned>;
    case kV41:
      return append_kernel<kV41, false, kAligned>;
    case kV41Fp4:
      return append_kernel<kV41Fp4, false, kAligned>;
    default:
      return copy_kernel<std::conditional_t<kAligned, Pairs, uint16_t>, true>;
  }
}

Kernel dequantize_kernel_for(const KVCacheParams& params) {
  using enum KVFormat;
  switch (params.format) {
    case kV32:
      return dequantize_kernel<kV32>;
    case kV32NoRope:
      return dequantize_kernel<kV32NoRope>;
    case kModel1:
      return dequantize_kernel<kModel1>;
    case kV41:
      return dequantize_kernel<kV41>;
    case kV41Fp4:
      return dequantize_kernel<kV41Fp4>;
    default:
      return params.aligned ? copy_kernel<Pairs, false> : copy_kernel<uint16_t, false>;
  }
}

void launch(const char* name, Kernel kernel, const KVCacheParams& params, void* stream) {
  const int64_t ctas = ceil_div(params.num_rows, static_cast<int64_t>(kWarps));
  if (ctas > 0) {
    device::launch_dependent(name, kernel, static_cast<unsigned>(ctas < kMaxCtas ? ctas : kMaxCtas), 32 * kWarps, 0,
                             stream, params);
  }
}

}  // namespace

void launch_append_kv_cache(const KVCacheParams& params, void* stream) {
  launch("append_kv_cache", params.aligned ? append_kernel_for<true>(params) : append_kernel_for<false>(params), params,
         stream);
}

void launch_dequantize_kv_cache(const KVCacheParams& params, void* stream) {
  launch("dequantize_kv_cache", dequantize_kernel_for(params), params, stream);
}

}  // namespace flash_mla
