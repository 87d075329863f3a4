// The eight producer warps of a CTA. Each copies what the CTA has of eight keys of a tile straight to its place: all of
// four of them, and of all eight the CTA's columns of the values. Key indices are fetched a tile ahead.
#pragma once

#include "device/sm100/tcgen05.cuh"
#include "device/sparse/key_lists.cuh"
#include "sm100/sparse_attention_paired/storage.h"

namespace flash_mla::sm100::sparse_attention_paired {

template <class C>
class RowProducerWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::lane_, Base::params_, Base::phases_, Base::storage_, Base::walk_, Base::warp_, Base::kLanes,
      Base::kWarpKeys;
  static_assert(kWarpKeys == 8);

 public:
  __device__ __forceinline__ RowProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp,
                                             int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) {
      if (entry.begins_piece()) {
        store_q(walk_.pending[entry.piece()]);
      }
      copy_tile(entry.slot(), row);
    });
  }

 private:
  // The last slices of Q go to tensor memory. A warp reaches a quarter of the lanes, and shares it with one other.
  __device__ __forceinline__ void store_q(const PieceFacts& facts) const {
    const int quarter = warp_ % 4, turn = warp_ / 4;
    const unsigned char* row = this->row_of_q(facts, this->rank() * kRowTile + quarter % 2 * 32 + this->opaque_lane());
    tcgen05_fence_after();
#pragma unroll 1
    for (int slice = C::kSharedQSlices + turn; slice < C::kSlices; slice += 2) {
      float registers[32];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float4 unit = make_float4(0, 0, 0, 0);
        if (row != nullptr) {
          unit = __ldg(reinterpret_cast<const float4*>(row + slice * kSliceRowBytes) + i);
        }
        registers[4 * i] = unit.x, registers[4 * i + 1] = unit.y, registers[4 * i + 2] = unit.z,
                      registers[4 * i + 3] = unit.w;
      }
      tmem_store_32x32(storage_.tensor_memory + tmem_lane(32 * quarter) + C::tensor_q(slice), registers);
    }
    tmem_wait_store();
    tcgen05_fence_before();
  }

  // Of a warp's keys the first four are those of rank 0. In a tile the keys of rank 0 come first.
  __device__ __forceinline__ void copy_tile(int slot, const unsigned char* row) {
    const uint32_t valid = this->valid_keys(row);
    const auto bits = reinterpret_cast<uintptr_t>(row);
    const int lane = this->opaque_lane(), key = lane / 8, unit = lane % 8, place = warp_ * 4 + key;
    const unsigned char* sources[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sources[half] =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * (4 * half + key))) + unit * 16;
    }
    const uint32_t offset = place * kSliceRowBytes + ((unit ^ place % 8) * 16);
    const uint32_t keys = shared_address(storage_.keys[0]) + slot * C::kKeyBytes + offset,
                   values = shared_address(storage_.values[0]) + slot * C::kValueBytes + offset;
    const uint32_t parity = phases_.parity(slot) ^ 1;

    mbarrier_wait(shared_address(&storage_.scores_full[slot]), parity);
    if (lane_ == 0) {
      storage_.valid[turn_][warp_] = static_cast<unsigned char>(valid);
      mbarrier_arrive(shared_address(&storage_.valid_full[turn_]));
      // Says so of Q in tensor memory, too.
      mbarrier_arrive(shared_address(&storage_.keys_full[slot]));
    }
    const unsigned char* const own = this->rank() == 0 ? sources[0] : sources[1];
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
      async_copy16(keys + s * C::kKeySliceBytes, own + s * kSliceRowBytes);
    }
    async_copy_arrive(shared_address(&storage_.keys_full[slot]));

    mbarrier_wait(shared_address(&storage_.values_empty[slot]), parity);
    const int column = this->rank() * C::kValueSlices * kSliceRowBytes;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int s = 0; s < C::kValueSlices; ++s) {
        async_copy16(values + half * C::kOwnKeys * kSliceRowBytes + s * C::kSliceBytes,
                     sources[half] + column + s * kSliceRowBytes);
      }
    }
    async_copy_arrive(shared_address(&storage_.values_full[slot]));
    phases_.advance(slot);
    turn_ = (turn_ + 1) % kValidTurns;
  }

  int turn_ = 0;
};

}  // namespace flash_mla::sm100::sparse_attention_paired
