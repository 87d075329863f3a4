// The eight producer warps. Each fetches, converts and stores eight keys of a tile, one in each of eight passes. The
// raw bytes of the next tile are on their way, in registers, while a slot is waited for. Key indices are fetched two
// tiles ahead.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"

namespace flash_mla::inline device {

// Of the four lanes that know a key, each holds the scales of a quarter of its columns.
template <class C, class Storage>
class ProducerWarp : KeyLists<C, Storage> {
  using Base = KeyLists<C, Storage>;
  using Base::ahead_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::phases_, Base::storage_, Base::warp_;
  static constexpr int kPasses = Base::kWarpKeys;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    // In the first two rounds there is nothing to convert: the indices, then the bytes of the first tile are fetched.
    // So there is one copy of all this in the code, whose fetching costs small calls much of their time.
    Entry entry{0};
    uint4 raw[kPasses];
    int round = 0;
#pragma unroll 1
    do {
      // All that has been fetched comes to be known complete here, at once: loads share the few counters that the
      // hardware has for them, so that a wait for one would be a wait for any that follow it.
      const Entry next = ahead_;
      const unsigned char* const next_row = this->locate(next);
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        const int slot = entry.slot();
        mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
        publish_valid(slot);
        copy_rope(slot);
        convert(entry, raw);
        // The readers order these stores before their use by the async proxy: here that would cost 400 cycles.
        __syncwarp();
        if (lane_ == 0) {
          mbarrier_arrive(shared_address(&storage_.k_full[slot][kValues]));
        }
        phases_.advance(slot);
      }
      this->fetch_indices();
      row_ = next_row;
      row_in_page_ = next_row_in_page_;
      entry = next;
      if (entry.exists()) {
        fetch_rows(entry, raw);
      }
    } while (++round < 2 || entry.exists());
    this->end();
  }

 private:
  static constexpr bool kTwoFormats = C::kExtraFormat != KVFormat::kNone && C::kExtraFormat != C::kFormat;
  static constexpr KVFormat kSecond = kTwoFormats ? C::kExtraFormat : C::kFormat;
  static __device__ __forceinline__ bool is_extra_format(const Entry& entry) { return kTwoFormats && entry.source(); }

  // Calls `function` with the format of the entry's source.
  template <class Function>
  __device__ __forceinline__ void with_format(const Entry& entry, Function&& function) const {
    if (is_extra_format(entry)) {
      function(RowFormat<kSecond>());
    } else {
      function(RowFormat<C::kFormat>());
    }
  }

  // The bytes of a tile whose rows are known.
  __device__ __forceinline__ void fetch_rows(const Entry& entry, uint4 (&raw)[kPasses]) {
    with_format(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const unsigned char* scales = row_ + kLayout.value_bytes();
      if constexpr (kLayout.scales_behind_page) {
        const int page = params_.keys[entry.source()].page;
        const int distance = (page - row_in_page_) * kLayout.row_stride() + row_in_page_ * kLayout.scale_stride();
        scales = row_ + (row_ == kZeroRow ? 0 : distance);
      }
      scales_ = format.load_scales(scales, lane_ % 4);
      const int lane = this->opaque_lane();
      const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        raw[pass] = format.load(reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, 4 * pass)), lane);
      }
    });
    if constexpr (C::kHasRope) {
      prefetch_l2(row_ + layout_of(C::kFormat).rope_offset());
    }
  }

  __device__ __forceinline__ void convert(const Entry& entry, const uint4 (&raw)[kPasses]) const {
    with_format(entry, [&](auto format) {
      const int lane = this->opaque_lane();
      float scales[kPasses];
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        scales[pass] = format.scale(scales_, 4 * pass + lane / 8, lane);
      }
      if (C::kRopeInValues && lane >= 28) {
        return;
      }
      // Lanes of odd slices store their second eight values first: so eight lanes store to 128 different bytes of the
      // banks. Key `pass` of the warp has its units permuted by it.
      const bool swapped = lane & 4;
      const uint32_t first = shared_address(storage_.k[0]) + entry.slot() * C::kTileBytes + lane / 4 * C::kSliceBytes +
                             warp_ * kPasses * kSliceRowBytes + (lane % 4 * 2 + swapped) * 16;
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        format.convert(raw[pass], scales[pass], swapped, (first ^ pass * 16) + pass * kSliceRowBytes,
                       (first ^ 16 ^ pass * 16) + pass * kSliceRowBytes);
      }
    });
  }

  // Which of the warp's keys are valid.
  __device__ __forceinline__ void publish_valid(int slot) {
    const uint32_t valid = this->valid_keys(row_);
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<unsigned char>(valid);
    }
  }

  // The RoPE columns, which are not converted, go straight to their place.
  __device__ __forceinline__ void copy_rope(int slot) const {
    if constexpr (C::kHasRope) {
      const int lane = this->opaque_lane();
      const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes + warp_ * kPasses * kSliceRowBytes;
      const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = i * 4 + lane / 8, part = lane % 8;
        const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, 4 * key));
        async_copy16(tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((part ^ key) * 16),
                     source + layout_of(C::kFormat).rope_offset() + part * 16);
      }
      async_copy_arrive(shared_address(&storage_.k_full[slot][kRope]));
    }
  }

  const unsigned char* row_ = kZeroRow;  // the lane's, of the tile whose bytes have been fetched
  int row_in_page_;
  QuarterScales scales_;
};

}  // namespace flash_mla::inline device
