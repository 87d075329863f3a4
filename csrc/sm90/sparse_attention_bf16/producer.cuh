// The four producer warps. Each copies sixteen keys of a tile, group of slices after group, straight to their places.
// Key indices are fetched a tile ahead.
#pragma once

#include "device/sparse/key_lists.cuh"
#include "sm90/sparse_attention_bf16/storage.h"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <class C>
class ProducerWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::lane_, Base::phases_, Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) {
      if (entry.slot() == 0) {
        copy_tile<0>(row);
      } else {
        copy_tile<1>(row);
      }
    });
  }

 private:
  // A warp copies 512 bytes at a time: two slices of two keys, or the RoPE slice of four.
  template <int kSlot>
  __device__ __forceinline__ void copy_tile(const unsigned char* row) {
    const uint32_t valid = this->valid_keys(row);
    const auto bits = reinterpret_cast<uintptr_t>(row);
    const int lane = this->opaque_lane(), odd = lane / 16, slice = lane % 16 / 8, unit = lane % 8;
    const unsigned char* sources[kWarpKeys / 2];
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) {
      sources[i] =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * (2 * i + odd))) + lane % 16 * 16;
    }
    const uint32_t tile = shared_address(storage_.k[kSlot]) + warp_ * kWarpKeys * kSliceRowBytes;
    const uint32_t first = tile + slice * C::kSliceBytes + odd * kSliceRowBytes + ((unit ^ odd) * 16);
#pragma unroll
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(kSlot, order);
      if (C::num_slices(group) == 0) {
        continue;
      }
      const uint32_t full = shared_address(&storage_.k_full[kSlot][group]);
      mbarrier_wait(shared_address(&storage_.k_empty[kSlot][group]), phases_.parity(kSlot) ^ 1);
      if (group == valid_group(kSlot) && lane_ == 0) {
        storage_.valid[kSlot][warp_] = static_cast<uint16_t>(valid);
        mbarrier_arrive(full);
      }
      if (group == kRope) {
#pragma unroll
        for (int i = 0; i < kWarpKeys / 4; ++i) {
          const int key = 4 * i + lane / 8;
          const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
          async_copy16(tile + C::first_slice(kRope) * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ key % 8) * 16),
                       source + C::first_slice(kRope) * 128 + unit * 16);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWarpKeys / 2; ++i) {
          async_copy16((first ^ (2 * i % 8 * 16)) + C::first_slice(group) * C::kSliceBytes + 2 * i * kSliceRowBytes,
                       sources[i] + C::first_slice(group) * 128);
        }
      }
      async_copy_arrive(full);
    }
    phases_.advance(kSlot);
  }
};

}  // namespace flash_mla::sm90::sparse_attention_bf16
