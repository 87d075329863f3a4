// The eight producer warps of a CTA over rows that are converted. Of its eight keys of a tile a warp converts four
// whole, whose values' columns of this CTA it stores twice, and of the other four the CTA's columns.
#pragma once

#include "device/sparse/fetched_rows.cuh"
#include "sm100/sparse_attention_paired/tensor_q.cuh"

namespace flash_mla::sm100::sparse_attention_paired {

template <class C>
class ProducerWarp : FetchedRows<C, Storage<C>> {
  using Base = FetchedRows<C, Storage<C>>;
  using Base::kLanes, Base::kOwnPasses, Base::kPasses;
  using Base::lane_, Base::params_, Base::phases_, Base::row_, Base::scales_, Base::storage_, Base::walk_, Base::warp_;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->run_ahead(false, [this](const Entry& entry, const uint4(&raw)[kPasses]) { make_tile(entry, raw); });
    this->end();
  }

 private:
  __device__ __forceinline__ void make_tile(const Entry& entry, const uint4 (&raw)[kPasses]) {
    const int slot = entry.slot();
    const uint32_t parity = phases_.parity(slot) ^ 1, valid = this->valid_keys(row_);
    mbarrier_wait(shared_address(&storage_.scores_full[slot]), parity);
    if (lane_ == 0) {
      publish_valid(storage_, turn_, warp_, valid);
    }
    copy_rope(slot);
    if (entry.begins_piece()) {
      store_tensor_q<C>(storage_.tensor_memory, warp_,
                        this->row_of_q(walk_.pending[entry.piece()],
                                       this->rank() * kRowTile + row_of_tensor_q(warp_, this->opaque_lane())));
    }
    with_format<C>(entry, [&](auto format) {
      const int lane = this->opaque_lane();
      float scales[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int unit = this->unit_of(pass, lane);
        scales[pass] = format.scale(scales_, kLanes * this->key_of(pass, lane) + unit / 8, unit);
      }
      // Lanes of odd slices store their second eight values first: so eight lanes store to 128 different bytes of the
      // banks.
      const bool swapped = lane & 4;
      const uint32_t unit = (lane % 4 * 2 + swapped) * 16, column = lane / 4 * C::kKeySliceBytes,
                     own_column = lane % 16 / 4 * C::kSliceBytes;
      const bool is_value = !C::kRopeInValues || lane < 28,
                 is_own_value = !C::kRopeInValues || this->unit_of(kOwnPasses, lane) < 28;
      const uint32_t keys = shared_address(storage_.keys[0]) + slot * C::kKeyBytes + column,
                     values = shared_address(storage_.values[0]) + slot * C::kValueBytes + own_column;
      uint4 words[kOwnPasses][2];
#pragma unroll
      for (int pass = 0; pass < kOwnPasses; ++pass) {
        words[pass][0] = format.eight_of(raw[pass], scales[pass], swapped);
        words[pass][1] = format.eight_of(raw[pass], scales[pass], !swapped);
        if (is_value) {
          const uint32_t place = keys + this->place_of(pass, unit);
          store_words(place, words[pass][0]);
          store_words(place ^ 16, words[pass][1]);
        }
      }
      __syncwarp();
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&storage_.keys_full[slot]));
      }
      mbarrier_wait(shared_address(&storage_.values_empty[slot]), parity);
      if (lane / 16 == this->rank() && is_value) {
#pragma unroll
        for (int pass = 0; pass < kOwnPasses; ++pass) {
          const uint32_t place = values + this->rank() * C::kOwnKeys * kSliceRowBytes + place_of(pass, unit);
          store_words(place, words[pass][0]);
          store_words(place ^ 16, words[pass][1]);
        }
      }
      if (is_own_value) {
#pragma unroll
        for (int pass = kOwnPasses; pass < kPasses; ++pass) {
          const uint32_t place = values + (this->rank() ^ 1) * C::kOwnKeys * kSliceRowBytes +
                                 place_of((pass - kOwnPasses) * 2 + lane / 16, unit);
          store_words(place, format.eight_of(raw[pass], scales[pass], swapped));
          store_words(place ^ 16, format.eight_of(raw[pass], scales[pass], !swapped));
        }
      }
    });
    copy_rope_of_values(slot);
    // The readers order these stores before their use by the async proxy.
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.values_full[slot]));
    }
    phases_.advance(slot);
    turn_ = (turn_ + 1) % kValidTurns;
  }

  // Of the warp's four keys of one rank, from where their slice begins.
  __device__ __forceinline__ uint32_t place_of(int key, uint32_t unit) const {
    const int row = warp_ * 4 + key;
    return row * kSliceRowBytes + (unit ^ row % 8 * 16);
  }

  // The RoPE columns go straight to their place.
  __device__ __forceinline__ void copy_rope(int slot) const {
    if constexpr (C::kHasRope) {
      const int lane = this->opaque_lane(), key = lane / 8, unit = lane % 8;
      const uint32_t slice =
          shared_address(storage_.keys[0]) + slot * C::kKeyBytes + (C::kSlices - 1) * C::kKeySliceBytes;
      async_copy16(slice + place_of(key, unit * 16), rope_of(this->rank() * 4 + key) + unit * 16);
      async_copy_arrive(shared_address(&storage_.keys_full[slot]));
    }
  }
  __device__ __forceinline__ void copy_rope_of_values(int slot) const {
    if constexpr (C::kRopeInValues) {
      const int lane = this->opaque_lane(), key = lane / 8, unit = lane % 8;
      const uint32_t slice =
          shared_address(storage_.values[0]) + slot * C::kValueBytes + (C::kValueSlices - 1) * C::kSliceBytes;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const unsigned char* const source = rope_of(half * 4 + key) + unit * 16;
        if (this->rank() == 1) {
          async_copy16(slice + half * C::kOwnKeys * kSliceRowBytes + place_of(key, unit * 16), source);
        }
      }
      async_copy_arrive(shared_address(&storage_.values_full[slot]));
    }
  }
  __device__ __forceinline__ const unsigned char* rope_of(int key) const {
    const auto bits = reinterpret_cast<uintptr_t>(row_);
    return reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key)) +
           layout_of(C::kFormat).rope_offset();
  }

  int turn_ = 0;
};

}  // namespace flash_mla::sm100::sparse_attention_paired
