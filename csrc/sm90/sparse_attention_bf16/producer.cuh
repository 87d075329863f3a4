// The four producer warps. Each copies sixteen keys of a tile, group of slices after group, straight to their places.
// Key indices are fetched two tiles ahead.
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

  // Two tiles at a time, so that nothing has to be looked up between the copies of the one and of the other. There are
  // no block tables here, whose rows only the last step locates.
  __device__ __forceinline__ void run() {
    int indices[2];
    Entry ahead[2];
    fetch(indices, ahead);
#pragma unroll 1
    while (ahead[0].exists()) {
      const Entry entries[2] = {ahead[0], ahead[1]};
      const unsigned char* rows[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        this->index_ = indices[i];
        rows[i] = this->locate(entries[i]);
      }
      fetch(indices, ahead);
#pragma unroll 1
      for (int i = 0; i < 2; ++i) {
        const Entry entry = i == 0 ? entries[0] : entries[1];
        const unsigned char* row = i == 0 ? rows[0] : rows[1];
        if (entry.begins_piece()) {
          this->begin_piece(entry.piece(), [this](const PieceFacts& facts) { copy_q(facts); });
        }
        if (entry.has_tile()) {
          if (entry.slot() == 0) {
            copy_tile<0>(row);
          } else {
            copy_tile<1>(row);
          }
        }
      }
    }
    this->end();
  }

 private:
  __device__ __forceinline__ void fetch(int (&indices)[2], Entry (&ahead)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      this->fetch_indices();
      indices[i] = this->index_;
      ahead[i] = this->ahead_;
    }
  }

  // A warp copies 512 bytes at a time: two slices of two rows, or the RoPE slice of four. `row`: of each row, the lanes
  // that know where it is.
  template <int kSlot, class Copy, class BeforeGroup>
  __device__ __forceinline__ void copy_rows(uint32_t tile, const unsigned char* row, Copy&& copy,
                                            BeforeGroup&& before_group) {
    const auto bits = reinterpret_cast<uintptr_t>(row);
    const int lane = this->opaque_lane(), odd = lane / 16, slice = lane % 16 / 8, unit = lane % 8;
    const unsigned char* sources[kWarpKeys / 2];
#pragma unroll
    for (int i = 0; i < kWarpKeys / 2; ++i) {
      sources[i] =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * (2 * i + odd))) + lane % 16 * 16;
    }
    tile += warp_ * kWarpKeys * kSliceRowBytes;
    const uint32_t first = tile + slice * C::kSliceBytes + odd * kSliceRowBytes + ((unit ^ odd) * 16);
#pragma unroll
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(kSlot, order);
      if (C::num_slices(group) == 0) {
        continue;
      }
      before_group(group);
      if (group == kRope) {
#pragma unroll
        for (int i = 0; i < kWarpKeys / 4; ++i) {
          const int key = 4 * i + lane / 8;
          const auto* source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
          copy(tile + C::first_slice(kRope) * C::kSliceBytes + key * kSliceRowBytes + ((unit ^ key % 8) * 16),
               source + C::first_slice(kRope) * 128 + unit * 16);
        }
      } else {
#pragma unroll
        for (int i = 0; i < kWarpKeys / 2; ++i) {
          copy((first ^ (2 * i % 8 * 16)) + C::first_slice(group) * C::kSliceBytes + 2 * i * kSliceRowBytes,
               sources[i] + C::first_slice(group) * 128);
        }
      }
    }
  }

  template <int kSlot>
  __device__ __forceinline__ void copy_tile(const unsigned char* row) {
    const uint32_t valid = this->valid_keys(row);
    const uint32_t full = shared_address(&storage_.k_full[kSlot]);
    copy_rows<kSlot>(
        shared_address(storage_.k[kSlot]), row,
        [](uint32_t destination, const unsigned char* source) { async_copy16(destination, source); },
        [&](int group) {
          mbarrier_wait(shared_address(&storage_.k_empty[kSlot][group]), phases_.parity(kSlot) ^ 1);
          if (group == valid_group(kSlot) && lane_ == 0) {
            storage_.valid[kSlot][warp_] = static_cast<uint16_t>(valid);
            mbarrier_arrive(full);
          }
        });
    async_copy_arrive(full);
    phases_.advance(kSlot);
  }

  __device__ __forceinline__ void copy_q(const PieceFacts& facts) {
    const unsigned char* row = this->row_of_q(facts, warp_ * kWarpKeys + lane_ / kLanes);
    const uint64_t policy = evict_first_policy();
    copy_rows<0>(
        shared_address(storage_.q), row == nullptr ? kZeroRow : row,
        [&](uint32_t destination, const unsigned char* source) { async_copy16_hinted(destination, source, policy); },
        [](int) {});
  }
};

}  // namespace flash_mla::sm90::sparse_attention_bf16
