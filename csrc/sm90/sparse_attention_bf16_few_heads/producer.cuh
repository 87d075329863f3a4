// The eight producer warps: each copies eight keys of a tile to their places.
#pragma once

#include "sm90/sparse_attention/key_lists.cuh"
#include "sm90/sparse_attention_bf16_few_heads/storage.h"

namespace flash_mla::sm90::sparse_attention_bf16_few_heads {

template <class C>
class ProducerWarp : sparse_attention::KeyLists<C, Storage<C>> {
  using Base = sparse_attention::KeyLists<C, Storage<C>>;
  using Base::lane_, Base::phases_, Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->copy_tiles(
        [this](const sparse_attention::Entry& entry, const unsigned char* row) { copy_tile(entry.slot(), row); });
  }

 private:
  __device__ __forceinline__ void copy_tile(int slot, const unsigned char* row) {
    const uint32_t full = shared_address(&storage_.k_full[slot]), valid = this->valid_keys(row);
    const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes + warp_ * kWarpKeys * kSliceRowBytes;
    const auto bits = reinterpret_cast<uintptr_t>(row);
    mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<unsigned char>(valid);
      mbarrier_arrive(full);
    }
#pragma unroll
    for (int key = 0; key < kWarpKeys; ++key) {
      const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key)) + lane_ * 16;
      const uint32_t place = tile + lane_ / 8 * C::kSliceBytes + key * kSliceRowBytes + ((lane_ % 8 ^ key) * 16);
      async_copy16(place, source);
      async_copy16(place + 4 * C::kSliceBytes, source + 4 * kSliceRowBytes);
    }
    if constexpr (C::kRopeBehindValues) {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        const int key = i * 4 + lane_ / 8, unit = lane_ % 8;
        const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
        async_copy16(tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ key) * 16),
                     source + C::kRopeSlice * kSliceRowBytes + unit * 16);
      }
    }
    async_copy_arrive(full);
    phases_.advance(slot);
  }
};

}  // namespace flash_mla::sm90::sparse_attention_bf16_few_heads
