// The eight converting warps. Each has eight keys of a tile, whose rows lie in shared memory as they are in the cache,
// and converts them, a quarter of their values after the other, into the places that the math warps have handed back.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"
#include "sm90/sparse_attention/storage.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class ConvertingWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::lane_, Base::params_, Base::storage_, Base::walk_, Base::warp_, Base::kWarpKeys;
  static constexpr int kSharers = C::kProducerWarps / C::kSenders;  // of what a sender brings
  static constexpr int kPasses = kWarpKeys / 4;                     // of a quarter: four keys at a time
  static constexpr int kLastQuarter = C::kQuarters - 1;             // with which the RoPE columns go
  static constexpr int kRopeUnits = C::kHasRope && !C::kRopeQuantised ? kPasses : 0;  // of 16 bytes, that a lane keeps

 public:
  __device__ __forceinline__ ConvertingWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp,
                                            int lane)
      : Base(params, storage, storage.walks[warp / kSharers], warp, lane, typename Base::IsTold()) {}

  // Waits for the kernels before this one.
  __device__ __forceinline__ void run() {
    wait_for_dependencies();
#pragma unroll 1
    for (uint32_t told = 0;; ++told) {
      mbarrier_wait(shared_address(&storage_.told[told % 2][sender()]), told / 2 % 2);
      const Entry entry{storage_.entries[told % 2][sender()]};
      const bool converts_first = this->makes_tile_before_q(entry);
      if (entry.begins_piece() && !converts_first) {
        this->begin_piece(entry.piece());
      }
      uint4 raw[kPasses];
      float scales[kPasses];
      if (entry.has_tile()) {
        mbarrier_wait(shared_address(&storage_.left_full[sender()]), tile_parity_);
        read<0>(entry, raw, scales);
        wait_for_place();
        convert<0>(entry, raw, scales);
        read<1>(entry, raw, scales);
      }
      hand_back(storage_.left_empty);
      if (converts_first) {
        this->begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        wait_for_place();
        convert<1>(entry, raw, scales);
        mbarrier_wait(shared_address(&storage_.right_full[sender()]), tile_parity_);
        read<2>(entry, raw, scales);
        if constexpr (C::kRopeQuantised) {
          convert_rope();
        }
        wait_for_place();
        convert<2>(entry, raw, scales);
        read<3>(entry, raw, scales);
        uint4 rope[kRopeUnits + 1];
        if constexpr (!C::kRopeQuantised) {
          read_rope(rope);
        }
        hand_back(storage_.right_empty);
        wait_for_place();
        convert<3>(entry, raw, scales, rope);
      } else if (!entry.exists()) {
        break;
      }
    }
    this->end();
  }

 private:
  // The warp that brings the rows.
  __device__ __forceinline__ int sender() const { return warp_ / kSharers; }
  // Of the warp's keys among those of its sender.
  __device__ __forceinline__ int first_of_sender() const { return warp_ % kSharers * kWarpKeys; }

  // The warp has read what lies in its buffers.
  __device__ __forceinline__ void hand_back(uint64_t (&barriers)[C::kSenders]) const {
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&barriers[sender()]));
    }
  }

  // A pass takes a quarter of four keys: eight lanes have one of them, and 16 values each: a unit.
  template <int kQuarter>
  __device__ __forceinline__ void read(const Entry& entry, uint4 (&raw)[kPasses], float (&scales)[kPasses]) const {
    const int lane = this->opaque_lane();
    with_format<C>(entry, [&](auto format) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = 4 * pass + lane / 8, unit = kQuarter % 2 * 8 + lane % 8;
        const unsigned char* bytes = kQuarter < 2 ? storage_.left[sender()][first_of_sender() + key]
                                                  : storage_.right[sender()][first_of_sender() + key];
        if constexpr (decltype(format)::kLayout.value_bits == 8) {
          raw[pass] = *reinterpret_cast<const uint4*>(bytes + unit * 16);
        } else {
          const uint2 half = *reinterpret_cast<const uint2*>(bytes + unit * 8);
          raw[pass] = make_uint4(half.x, half.y, 0, 0);
        }
        scales[pass] =
            format.scale(storage_.scales[tile_parity_][sender()][first_of_sender() + key], kQuarter * 8 + lane % 8);
      }
    });
  }

  // For the next quarter.
  __device__ __forceinline__ void wait_for_place() const {
    mbarrier_wait(shared_address(&storage_.k_empty[place_.stage]), place_.parity ^ 1);
  }

  // A quarter goes to the next place of the ring, once it is free. `rope`: these columns go with it.
  template <int kQuarter>
  __device__ __forceinline__ void convert(const Entry& entry, const uint4 (&raw)[kPasses],
                                          const float (&scales)[kPasses], const uint4 (&rope)[kRopeUnits + 1] = {}) {
    const int lane = this->opaque_lane(), unit = kQuarter * 8 + lane % 8, key_in_pass = lane / 8;
    const uint32_t quarter =
        shared_address(storage_.k) + place_.stage * C::kQuarterBytes + this->first_key() * kSliceRowBytes;
    // Lanes of odd slices store their second eight values first: so eight lanes store to 128 different bytes of the
    // banks. A key has its units permuted by its number.
    const bool swapped = lane & 4;
    const uint32_t first = quarter + (lane & 4) / 4 * C::kSliceBytes + key_in_pass * kSliceRowBytes +
                           ((lane % 4 * 2 + swapped) ^ key_in_pass) * 16;
    if (!C::kRopeInValues || unit < 28) {
      with_format<C>(entry, [&](auto format) {
#pragma unroll
        for (int pass = 0; pass < kPasses; ++pass) {
          const int key = 4 * pass;  // and `key_in_pass`
          const uint32_t place = (first ^ key % 8 * 16) + key * kSliceRowBytes;
          format.convert(raw[pass], scales[pass], swapped, place, place ^ 16);
        }
      });
    }
    if constexpr (kRopeUnits > 0 && C::kRopeBehindValues && kQuarter == kLastQuarter) {
      mbarrier_wait(shared_address(&storage_.tail_empty), tile_parity_ ^ 1);
      store_rope(rope, shared_address(storage_.tail) + this->first_key() * kSliceRowBytes);
    }
    if constexpr (kRopeUnits > 0 && C::kRopeInValues && kQuarter == kLastQuarter) {
      store_rope(rope, quarter + C::kSliceBytes);
    }
    if constexpr (kQuarter == kLastQuarter) {
      tile_parity_ ^= 1;
    }
    // The readers order the stores before their use by the async proxy.
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_full[place_.stage]));
    }
    place_.advance();
  }

  // The RoPE columns, which have one format in both sources: as they are, between the buffer and their place.
  __device__ __forceinline__ void read_rope(uint4 (&rope)[kRopeUnits + 1]) const {
    const int lane = this->opaque_lane();
#pragma unroll
    for (int i = 0; i < kRopeUnits; ++i) {
      rope[i] =
          *reinterpret_cast<const uint4*>(&storage_.right[sender()][first_of_sender() + i * 4 + lane / 8]
                                                         [(C::kRopeInValues ? 192 : C::kLeftBytes) + lane % 8 * 16]);
    }
  }

  __device__ __forceinline__ void store_rope(const uint4 (&rope)[kRopeUnits + 1], uint32_t rows) const {
    const int lane = this->opaque_lane();
#pragma unroll
    for (int i = 0; i < kRopeUnits; ++i) {
      const int key = i * 4 + lane / 8;
      store_words(rows + key * kSliceRowBytes + ((lane % 8 ^ key % 8) * 16), rope[i]);
    }
  }

  // Those that are e4m3 values too are converted at once, a quarter of a key by a lane: registers do not suffice to
  // keep them.
  __device__ __forceinline__ void convert_rope() const {
    const int lane = this->opaque_lane();
    mbarrier_wait(shared_address(&storage_.tail_empty), tile_parity_ ^ 1);
#pragma unroll
    for (int i = 0; i < kWarpKeys / 8; ++i) {
      const int key = 8 * i + lane / 4;
      const uint4 raw = *reinterpret_cast<const uint4*>(
          &storage_.right[sender()][first_of_sender() + key][C::kLeftBytes + lane % 4 * 16]);
      const uint32_t place =
          shared_address(storage_.tail) + (this->first_key() + key) * kSliceRowBytes + ((lane % 4 * 2) ^ key % 8) * 16;
      RowFormat<C::kFormat>::convert(raw, 1, false, place, place ^ 16);
    }
  }

  uint32_t tile_parity_ = 0;
  Ring<C::kPlaces> place_;  // of the next quarter
};

}  // namespace flash_mla::sm90::sparse_attention
