// The producer warps, of two kinds. Where rows are of 16-bit values, each copies its keys of a tile to their places.
// Else, where an architecture has nothing else for it, each brings its keys of a tile into a ring of its own, as they
// are in memory, converts them from there two at a time, and sends for two keys of the next tile in their place. So
// there are always about as many bytes on their way as a tile has.
#pragma once

#include <type_traits>

#include "device/few_rows/storage.h"
#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"

namespace flash_mla::inline device {

// How a warp brings rows into its ring, and what a lane reads there: 16 values, a unit, of each row.
template <KVFormat kFormat>
struct RingFormat {
  static constexpr KVLayout kLayout = layout_of(kFormat);
  static constexpr int kRowBytes = kLayout.row_stride();
  using Row = RowFormat<kFormat>;

  static __device__ __forceinline__ void copy(const unsigned char* row, const unsigned char* scales, uint32_t ring,
                                              int lane) {
#pragma unroll
    for (int i = 0; i < ceil_div(kRowBytes, 512); ++i) {
      const int at = i * 512 + lane * 16;
      if ((i + 1) * 512 <= kRowBytes || at < kRowBytes) {
        async_copy16(ring + at, row + at);
      }
    }
    if constexpr (kLayout.scales_behind_page) {
      if (lane == 0) {
        async_copy8(ring + kRowBytes, scales);
      }
    }
  }

  static __device__ __forceinline__ uint4 load(const unsigned char* ring, int lane) {
    if constexpr (kLayout.value_bits == 8) {
      return *reinterpret_cast<const uint4*>(ring + lane * 16);
    } else {
      const uint2 half = *reinterpret_cast<const uint2*>(ring + lane * 8);
      return make_uint4(half.x, half.y, 0, 0);
    }
  }

  static __device__ __forceinline__ float scale(const unsigned char* ring, int lane) {
    return Row::scale(ring + (kLayout.scales_behind_page ? kRowBytes : kLayout.value_bytes()), lane);
  }
};

template <class C, class Storage>
class ConvertingWarp : KeyLists<C, Storage> {
  using Base = KeyLists<C, Storage>;
  using Entry = Entry;
  using Base::ahead_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::phases_, Base::storage_, Base::warp_,
      Base::kLanes, Base::kWarpKeys;
  static constexpr int kSteps = kWarpKeys / 2;

 public:
  __device__ __forceinline__ ConvertingWarp(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->wait_if_early();
    // In the first two rounds there is nothing to convert: the indices, then the bytes of the first tile are sent for.
    Entry entry{0};
    uint32_t valid = 0;
    int round = 0;
#pragma unroll 1
    do {
      const Entry next = ahead_;
      const unsigned char* const row = this->locate(next);
      const int row_in_page = next_row_in_page_;
      this->fetch_indices();
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        mbarrier_wait(shared_address(&storage_.k_empty[entry.slot()]), phases_.parity(entry.slot()) ^ 1);
        if (lane_ == 0) {
          storage_.valid[entry.slot()][warp_] = static_cast<unsigned char>(valid);
        }
      }
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        if (entry.has_tile()) {
          async_copy_wait<kSteps - 1>();
          __syncwarp();
          convert(entry, step);
          __syncwarp();
        }
        if (next.has_tile()) {
          copy(next, step, row, row_in_page);
        }
        async_copy_commit();
      }
      if (entry.has_tile()) {
        // The readers order the stores before their use by the async proxy.
        if (lane_ == 0) {
          mbarrier_arrive(shared_address(&storage_.k_full[entry.slot()]));
        }
        phases_.advance(entry.slot());
      }
      entry = next;
      valid = this->valid_keys(row);
    } while (++round < 2 || entry.exists());
    this->end();
  }

 private:
  __device__ __forceinline__ void copy(const Entry& entry, int step, const unsigned char* row, int row_in_page) const {
    with_format<C, RingFormat>(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const unsigned char* scales = row;
      if constexpr (kLayout.scales_behind_page) {
        const int page = params_.keys[entry.source()].page;
        const int distance = (page - row_in_page) * kLayout.row_stride() + row_in_page * kLayout.scale_stride();
        scales += row == kZeroRow ? kLayout.row_stride() : distance;
      }
      const auto row_bits = reinterpret_cast<uintptr_t>(row), scale_bits = reinterpret_cast<uintptr_t>(scales);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = 2 * step + i;
        const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, row_bits, kLanes * key));
        const auto* its_scales =
            kLayout.scales_behind_page
                ? reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, scale_bits, kLanes * key))
                : nullptr;
        format.copy(source, its_scales, shared_address(storage_.staging[warp_][key]), lane_);
      }
    });
  }

  // Two keys from the ring into the tile.
  __device__ __forceinline__ void convert(const Entry& entry, int step) const {
    const uint32_t tile =
        shared_address(storage_.k[0]) + entry.slot() * C::kTileBytes + this->first_key() * kSliceRowBytes;
    with_format<C, RingFormat>(entry, [&](auto format) {
      uint4 raw[2];
      float scale[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const unsigned char* ring = storage_.staging[warp_][2 * step + i];
        raw[i] = format.load(ring, lane_);
        scale[i] = format.scale(ring, lane_);
      }
      // Lanes of odd slices store their second eight values first: so eight lanes store to 128 different bytes of the
      // banks. A key has its units permuted by its number.
      const bool swapped = lane_ & 4;
      const uint32_t first =
          tile + lane_ / 4 * C::kSliceBytes + ((lane_ % 4 * 2 + swapped) ^ this->first_key() % 8) * 16;
      if (!C::kRopeInValues || lane_ < 28) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int key = 2 * step + i;
          decltype(format)::Row::convert(raw[i], scale[i], swapped, (first ^ key * 16) + key * kSliceRowBytes,
                                         (first ^ 16 ^ key * 16) + key * kSliceRowBytes);
        }
      }
    });
    if constexpr (C::kFormat == KVFormat::kE4m3) {
      if (lane_ < 8) {
        const int key = 2 * step + lane_ / 4, unit = lane_ % 4;
        const uint4 raw = *reinterpret_cast<const uint4*>(
            &storage_.staging[warp_][key][layout_of(C::kFormat).rope_offset() + unit * 16]);
        const uint32_t place = tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes +
                               (unit * 2 ^ this->first_key() % 8 ^ key) * 16;
        RowFormat<C::kFormat>::convert(raw, 1, false, place, place ^ 16);
      }
    } else if constexpr (C::kRopeBehindValues || C::kRopeInValues) {
      if (lane_ < 16) {
        const int key = 2 * step + lane_ / 8, unit = lane_ % 8;
        const uint4 words = *reinterpret_cast<const uint4*>(
            &storage_.staging[warp_][key][layout_of(C::kFormat).rope_offset() + unit * 16]);
        store_words(
            tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ this->first_key() % 8 ^ key) * 16),
            words);
      }
    }
  }
};

template <class C, class Storage>
class CopyingWarp : KeyLists<C, Storage> {
  using Base = KeyLists<C, Storage>;
  using Base::lane_, Base::phases_, Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ CopyingWarp(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->wait_if_early();
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) { copy_tile(entry.slot(), row); });
  }

 private:
  __device__ __forceinline__ void copy_tile(int slot, const unsigned char* row) {
    const uint32_t full = shared_address(&storage_.k_full[slot]), valid = this->valid_keys(row);
    const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes + this->first_key() * kSliceRowBytes;
    const auto bits = reinterpret_cast<uintptr_t>(row);
    mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<unsigned char>(valid);
      mbarrier_arrive(full);
    }
#pragma unroll
    for (int key = 0; key < kWarpKeys; ++key) {
      const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key)) + lane_ * 16;
      const uint32_t place =
          tile + lane_ / 8 * C::kSliceBytes + key * kSliceRowBytes + ((lane_ % 8 ^ this->first_key() % 8 ^ key) * 16);
      async_copy16(place, source);
      async_copy16(place + 4 * C::kSliceBytes, source + 4 * kSliceRowBytes);
    }
    if constexpr (C::kRopeBehindValues) {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        const int key = i * 4 + lane_ / 8, unit = lane_ % 8;
        const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
        async_copy16(
            tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ this->first_key() % 8 ^ key) * 16),
            source + C::kRopeSlice * kSliceRowBytes + unit * 16);
      }
    }
    async_copy_arrive(full);
    phases_.advance(slot);
  }
};

template <class C, class Storage>
using FewRowsProducerWarp = std::conditional_t<C::kCopied, CopyingWarp<C, Storage>, ConvertingWarp<C, Storage>>;

}  // namespace flash_mla::inline device
