// The eight producer warps. Each fetches, converts and stores eight keys of a tile, one in each of eight passes, or the
// halves of two where another CTA has the other halves. The raw bytes of the next tile are on their way, in registers,
// while a slot is waited for. Key indices are fetched two tiles ahead.
#pragma once

#include "device/sparse/fetched_rows.cuh"

namespace flash_mla::inline device {

template <class C, class Storage>
class ProducerWarp : FetchedRows<C, Storage> {
  using Base = FetchedRows<C, Storage>;
  using Base::ahead_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::phases_, Base::raw_rope_, Base::row_,
      Base::row_in_page_, Base::scales_, Base::storage_, Base::warp_;
  using Base::kLanes, Base::kPaired, Base::kPasses, Base::kRopeQuantised, Base::kUnits, Base::kWarpKeys;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  // Waits for the kernels before this one.
  __device__ __forceinline__ void run() {
    const bool early = kStartsEarly && params_.cut_evenly;
    if (early) {
      this->find_piece_early();
    }
    if constexpr (kPaired) {
      this->run_ahead(early, [this](const Entry& entry, const uint4(&raw)[kPasses]) { make_tile(entry, raw); });
    } else {
      run_rehearsed(early);
    }
    this->end();
  }

 private:
  // With two formats and whole rows the registers do not suffice for it.
  static constexpr bool kStartsEarly = requires { C::kStartsEarly; } && (kPaired || !kTwoFormats<C>);

  // Loads share the few counters that the hardware has for them, so that a wait for one would be a wait for any that
  // follow it: in both orders all that has been fetched comes to be known complete at one place in a round. There is
  // one copy of a round in the code, whose fetching costs small calls much of their time.

  // The first round is a rehearsal, in which the indices of the first tile are fetched and, while these are on their
  // way, the instructions. What it stores in a slot is overwritten. `early`: another rehearsal before that, while the
  // kernels before this one run.
  __device__ __forceinline__ void run_rehearsed(bool early) {
    Entry entry{0};
    uint4 raw[kPasses] = {};
    if (!early) {
      wait_for_dependencies();
    }
#pragma unroll 1
    for (;; early = false) {
      if (!early) {
        this->fetch_indices();
      }
      this->fetch_rows(entry, raw);
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece());
      }
      if (entry.has_tile() || !entry.exists()) {
        make_tile(entry, raw);
      }
      if (early) {
        wait_for_dependencies();
        continue;
      }
      entry = ahead_;
      row_ = this->locate(entry);
      row_in_page_ = next_row_in_page_;
      if (!entry.exists()) {
        return;
      }
    }
  }

  // The entry's tile, if it has one; else the same steps without a word to anybody.
  __device__ __forceinline__ void make_tile(const Entry& entry, const uint4 (&raw)[kPasses]) {
    const int slot = kPaired ? ring_.stage : entry.slot();
    mbarrier_wait(shared_address(&storage_.k_empty[slot]), (kPaired ? ring_.parity : phases_.parity(slot)) ^ 1);
    publish_valid(slot);
    if (entry.has_tile()) {
      copy_rope(slot);
    }
    convert(entry, slot, raw);
    // The readers order these stores before their use by the async proxy: here that would cost 400 cycles.
    __syncwarp();
    if (entry.has_tile()) {
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&storage_.k_full[slot][kValues]));
      }
      if constexpr (kPaired) {
        ring_.advance();
      } else {
        phases_.advance(slot);
      }
    }
  }

  __device__ __forceinline__ void convert(const Entry& entry, int slot, const uint4 (&raw)[kPasses]) const {
    with_format<C>(entry, [&](auto format) {
      const int lane = this->opaque_lane(), odd = lane / kUnits, own = lane % kUnits,
                unit = this->rank() * kUnits + own;
      float scales[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        scales[pass] = format.scale(scales_, kLanes * (pass * C::kRanks + odd) + own / 8, unit);
      }
      if (C::kRopeInValues && unit >= 28) {
        return;
      }
      // Lanes of odd slices store their second eight values first: so eight lanes store to 128 different bytes of the
      // banks. A warp's key has its units permuted by its number.
      const bool swapped = lane & 4;
      const uint32_t first = shared_address(storage_.k[0]) + slot * C::kTileBytes + own / 4 * C::kSliceBytes +
                             (this->first_key() + odd) * kSliceRowBytes + ((lane % 4 * 2 + swapped) ^ odd) * 16;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = pass * C::kRanks;  // and `odd`
        const uint32_t place = (first ^ key % 8 * 16) + key * kSliceRowBytes;
        format.convert(raw[pass], scales[pass], swapped, place, place ^ 16);
      }
    });
  }

  // Which of the warp's keys are valid.
  __device__ __forceinline__ void publish_valid(int slot) {
    const uint32_t valid = this->valid_keys(row_);
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<uint8_t>(valid);
    }
  }

  // The RoPE columns go straight to their place where they are not converted.
  __device__ __forceinline__ void copy_rope(int slot) const {
    if constexpr (kRopeQuantised) {
      // A lane has a quarter of the key that it knows.
      const int lane = this->opaque_lane(), key = lane / kLanes;
      const uint32_t place = shared_address(storage_.k[0]) + slot * C::kTileBytes + C::kRopeSlice * C::kSliceBytes +
                             (this->first_key() + key) * kSliceRowBytes + ((lane % kLanes * 2) ^ key) * 16;
      RowFormat<C::kFormat>::convert(raw_rope_, 1, false, place, place ^ 16);
      mbarrier_arrive(shared_address(&storage_.k_full[slot][kRope]));
    } else if constexpr (C::kHasRope) {
      const int lane = this->opaque_lane();
      const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes;
      if constexpr (kPaired && C::kRopeBehindValues) {
        const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
        for (int i = 0; i < kWarpKeys / 8; ++i) {
          const int key = i * 8 + lane / 4;
          const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
          async_copy16(this->half_rope_unit(tile, this->first_key() + key, lane % 4),
                       source + layout_of(C::kFormat).rope_offset() + this->rank() * C::kRopeRowBytes + lane % 4 * 16);
        }
      } else if (!kPaired || this->rank() == 1) {
        const uint32_t rows = tile + C::kRopeSlice * C::kSliceBytes + this->first_key() * kSliceRowBytes;
        const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
        for (int i = 0; i < kWarpKeys / 4; ++i) {
          const int key = i * 4 + lane / 8, part = lane % 8;
          const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
          async_copy16(rows + key * kSliceRowBytes + ((part ^ key % 8) * 16),
                       source + layout_of(C::kFormat).rope_offset() + part * 16);
        }
      }
      async_copy_arrive(shared_address(&storage_.k_full[slot][kRope]));
    }
  }

  Ring<3> ring_;  // of the slots, where they are used in turn
};

}  // namespace flash_mla::inline device
