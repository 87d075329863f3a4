// The eight producer warps of kernels over 16-bit rows. Each copies eight keys of a tile straight to their places. Key
// indices are fetched a tile ahead.
#pragma once

#include "device/sparse/key_lists.cuh"
#include "sm100/sparse_attention/storage.h"

namespace flash_mla::sm100::sparse_attention {

template <class C>
class RowProducerWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::lane_, Base::phases_, Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ RowProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp,
                                             int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) { copy_tile(entry.slot(), row); });
  }

 private:
  // A warp copies 512 bytes at a time: two slices of two keys, or the RoPE slice of four.
  __device__ __forceinline__ void copy_tile(int slot, const unsigned char* row) {
    const uint32_t valid = this->valid_keys(row);
    const auto bits = reinterpret_cast<uintptr_t>(row);
    const int lane = this->opaque_lane(), odd = lane / 16, slice = lane % 16 / 8, unit = lane % 8;
    const unsigned char* sources[kWarpKeys / 2];
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) {
      sources[i] =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * (2 * i + odd))) + lane % 16 * 16;
    }
    const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes + this->first_key() * kSliceRowBytes;
    const uint32_t first = tile + slice * C::kSliceBytes + odd * kSliceRowBytes + ((unit ^ odd) * 16);
    const uint32_t values_full = shared_address(&storage_.k_full[slot][kValues]);
    mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<unsigned char>(valid);
      mbarrier_arrive(values_full);
    }
#pragma unroll
    for (int s = C::first_slice(kValues); s < C::first_slice(kValues) + C::num_slices(kValues); s += 2) {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 2; ++i) {
        async_copy16((first ^ (2 * i % 8 * 16)) + s * C::kSliceBytes + 2 * i * kSliceRowBytes,
                     sources[i] + s * kSliceRowBytes);
      }
    }
    async_copy_arrive(values_full);
    if constexpr (C::kHasRope) {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 4; ++i) {
        const int key = 4 * i + lane / 8;
        const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
        async_copy16(tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ key % 8) * 16),
                     source + C::kRopeSlice * kSliceRowBytes + unit * 16);
      }
      async_copy_arrive(shared_address(&storage_.k_full[slot][kRope]));
    }
    phases_.advance(slot);
  }
};

}  // namespace flash_mla::sm100::sparse_attention
