// The producer warps: each copies 16 keys of a tile, as they are in memory, into the ring.
#pragma once

#include "sm90/sparse_attention/key_lists.cuh"
#include "sm90/sparse_attention_few_heads/storage.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <class C>
class ProducerWarp : sparse_attention::KeyLists<C, Storage<C>> {
  using Base = sparse_attention::KeyLists<C, Storage<C>>;
  using Entry = sparse_attention::Entry;
  using Base::lane_, Base::next_row_in_page_, Base::params_, Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;
  static_assert(kWarpKeys == C::kGroupKeys);

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {
    place_.group = warp;
  }

  __device__ __forceinline__ void run() {
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) {
      // Of this tile: the indices of the next one have been fetched, but not located.
      const uint32_t valid = this->valid_keys(row);
      mbarrier_wait(shared_address(&storage_.empty[place_.group]), place_.parity ^ 1);
      const uint32_t full = shared_address(&storage_.full[place_.group]);
      if (lane_ == 0) {
        storage_.valid[place_.group] = valid | (C::kTwoFormats && entry.source() ? kOfSecondFormat : 0);
        mbarrier_arrive(full);
      }
      if (C::kTwoFormats && entry.source()) {
        copy<C::kSecondFormat>(entry, row);
      } else {
        copy<C::kFormat>(entry, row);
      }
      async_copy_arrive(full);
      place_.advance(C::kTileGroups);
    });
  }

 private:
  template <class T>
  static __device__ __forceinline__ const unsigned char* of_key(const T* pointer, int key) {
    return reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(pointer), kLanes * key));
  }

  template <KVFormat kFormat>
  __device__ __forceinline__ void copy(const Entry& entry, const unsigned char* row) const {
    constexpr KVLayout kLayout = layout_of(kFormat);
    constexpr int kUnits = kLayout.value_bytes() / 16;
    const uint32_t rows = shared_address(storage_.rows[place_.group]);
    const int lane = this->opaque_lane();
    if constexpr (kUnits == 32) {
#pragma unroll
      for (int key = 0; key < kWarpKeys; ++key) {
        async_copy16(rows + key * C::kRowBytes + lane * 16, of_key(row, key) + lane * 16);
      }
    } else if constexpr (kUnits == 16) {
#pragma unroll
      for (int key = 0; key < kWarpKeys; key += 2) {
        const int its = key + lane / 16;
        async_copy16(rows + its * C::kRowBytes + lane % 16 * 16, of_key(row, its) + lane % 16 * 16);
      }
    } else {
      static_assert(kUnits == 28);
#pragma unroll
      for (int key = 0; key < kWarpKeys; ++key) {
        const unsigned char* source = of_key(row, key);
        if (lane < kUnits) {
          async_copy16(rows + key * C::kRowBytes + lane * 16, source + lane * 16);
        }
      }
    }
    if constexpr (kLayout.scales_behind_page) {
      const int page = params_.keys[entry.source()].page;
      const int distance =
          (page - next_row_in_page_) * kLayout.row_stride() + next_row_in_page_ * kLayout.scale_stride();
      const unsigned char* scales = row + (row == sparse_attention::kZeroRow ? kLayout.row_stride() : distance);
      if (lane % kLanes == 0) {
        async_copy8(rows + lane / kLanes * C::kRowBytes + kLayout.value_bytes(), scales);
      }
    } else if constexpr (kLayout.scale_bytes() == 16) {
      if (lane % kLanes == 0) {
        async_copy16(rows + lane / kLanes * C::kRowBytes + kLayout.value_bytes(), row + kLayout.value_bytes());
      }
    } else {
      static_assert(kLayout.scale_bytes() == 16 * kLanes);
      const int at = kLayout.value_bytes() + lane % kLanes * 16;
      async_copy16(rows + lane / kLanes * C::kRowBytes + at, row + at);
    }
    if constexpr (kLayout.rope() > 0) {
      const uint32_t rope = shared_address(storage_.rope[place_.group]);
#pragma unroll
      for (int key = 0; key < kWarpKeys; key += 4) {
        const int its = key + lane / 8, unit = lane % 8;
        async_copy16(rope + its * kSliceRowBytes + ((unit ^ its % 8) * 16),
                     of_key(row, its) + kLayout.rope_offset() + unit * 16);
      }
    }
  }

  RingPlace<C> place_;
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
