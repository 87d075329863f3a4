// The producer warps over bfloat16 rows. Each copies sixteen keys of a tile, this CTA's columns of them, straight to
// their places. Key indices are fetched a tile ahead.
#pragma once

#include "sm90/sparse_attention/key_lists.cuh"
#include "sm90/sparse_attention_paired/storage.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C, class Storage>
class RowCopier : sparse_attention::KeyLists<C, Storage> {
  using Base = sparse_attention::KeyLists<C, Storage>;
  using Base::storage_, Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ RowCopier(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->copy_tiles([this](const sparse_attention::Entry&, const unsigned char* row) { copy_tile(row); });
  }

 private:
  // A warp copies the 512 bytes of a key's values at a time, then 64 bytes of eight keys' RoPE columns.
  __device__ __forceinline__ void copy_tile(const unsigned char* row) {
    const int stage = ring_.stage, lane = this->opaque_lane();
    const uint32_t full = shared_address(&storage_.k_full[stage][kValues]), tile = shared_address(storage_.k[stage]);
    const uint32_t valid = this->valid_keys(row);
    const auto bits = reinterpret_cast<uintptr_t>(row);
    mbarrier_wait(shared_address(&storage_.k_empty[stage]), ring_.parity ^ 1);
    if (lane == 0) {
      storage_.valid[stage][warp_] = static_cast<uint16_t>(valid);
      mbarrier_arrive(full);
    }
    const uint32_t first = tile + lane / 8 * C::kSliceBytes + this->first_key() * kSliceRowBytes + lane % 8 * 16;
#pragma unroll
    for (int key = 0; key < kWarpKeys; ++key) {
      const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
      async_copy16((first ^ key % 8 * 16) + key * kSliceRowBytes, source + this->rank() * 512 + lane * 16);
    }
    if constexpr (C::kRopeBehindValues) {
#pragma unroll
      for (int i = 0; i < kWarpKeys / 8; ++i) {
        const int key = i * 8 + lane / 4;
        const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
        async_copy16(this->half_rope_unit(tile, this->first_key() + key, lane % 4),
                     source + kHeadDimV * 2 + this->rank() * C::kRopeRowBytes + lane % 4 * 16);
      }
    }
    async_copy_arrive(full);
    ring_.advance();
  }

  Ring<C::kStages> ring_;
};

}  // namespace flash_mla::sm90::sparse_attention_paired
