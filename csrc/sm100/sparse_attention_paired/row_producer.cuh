// The eight producer warps of a CTA. Each copies what the CTA has of eight keys of a tile straight to its place: all of
// four of them, and of all eight the CTA's columns of the values. Key indices are fetched a tile ahead.
#pragma once

#include "device/sparse/key_lists.cuh"
#include "sm100/sparse_attention_paired/tensor_q.cuh"

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
    this->copy_tiles([this](const Entry& entry, const unsigned char* row) { copy_tile(entry, row); });
  }

 private:
  // Of a warp's keys the first four are those of rank 0. In a tile the keys of rank 0 come first.
  __device__ __forceinline__ void copy_tile(const Entry& entry, const unsigned char* row) {
    const int slot = entry.slot();
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
      publish_valid(storage_, turn_, warp_, valid);
    }
    const unsigned char* const own = this->rank() == 0 ? sources[0] : sources[1];
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
      async_copy16(keys + s * C::kKeySliceBytes, own + s * kSliceRowBytes);
    }
    async_copy_arrive(shared_address(&storage_.keys_full[slot]));
    if (entry.begins_piece()) {
      store_tensor_q<C>(storage_.tensor_memory, warp_,
                        this->row_of_q(walk_.pending[entry.piece()],
                                       this->rank() * kRowTile + row_of_tensor_q(warp_, this->opaque_lane())));
    }
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.keys_full[slot]));
    }

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
