// The bytes of rows that are to be converted, on their way in registers: a warp fetches its eight keys of a tile, one
// in each of eight passes, or the halves of two where another CTA has the other halves.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"

namespace flash_mla::inline device {

// Of the four lanes that know a key each holds the scales of a quarter of a row; where the CTA has half of the columns,
// two lanes hold the same.
template <class C, class Storage>
class FetchedRows : protected KeyLists<C, Storage> {
  using Base = KeyLists<C, Storage>;

 protected:
  using Base::ahead_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::kLanes, Base::kWarpKeys;
  static constexpr bool kPaired = C::kRanks == 2;
  // Of a pair each CTA has all columns of half of the keys, and half of those of the values of the others.
  static constexpr bool kOwnKeys = requires { C::kOwnKeys; };
  static constexpr int kUnits = 32 / C::kRanks;  // of 16 values, that this CTA has of a row
  static constexpr int kOwnPasses = kWarpKeys / 2;
  static constexpr int kPasses = kOwnKeys ? kOwnPasses + kWarpKeys / 4 : kWarpKeys / C::kRanks;
  static constexpr int kQuarters = 4 / C::kRanks;  // of a row's columns, that this CTA has
  static constexpr bool kRopeQuantised = C::kFormat == KVFormat::kE4m3;
  static_assert(!(kPaired || kOwnKeys) || !kRopeQuantised);

  using Base::Base;

  // Where the CTA has own keys: which of the warp's keys a lane has in a pass, and which 16 values of its row.
  __device__ __forceinline__ int key_of(int pass, int lane) const {
    return pass < kOwnPasses ? this->rank() * kOwnPasses + pass
                             : (this->rank() ^ 1) * kOwnPasses + (pass - kOwnPasses) * 2 + lane / 16;
  }
  __device__ __forceinline__ int unit_of(int pass, int lane) const {
    return pass < kOwnPasses ? lane : this->rank() * 16 + lane % 16;
  }

  static __device__ __forceinline__ const unsigned char* row_of_key(uintptr_t bits, int key) {
    return reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, kLanes * key));
  }

  // The next tile's rows are located before the slot of this one is waited for, and so asked for sooner, which counts
  // where tiles are short: 5 % of a large call of pairs over V32. In the first two rounds there is nothing to convert;
  // `early`: the first one rehearses it, while the kernels before this one run.
  template <class MakeTile>
  __device__ __forceinline__ void run_ahead(bool early, MakeTile&& make_tile) {
    Entry entry{0};
    uint4 raw[kPasses] = {};
    int round = 0;
#pragma unroll 1
    do {
      const Entry next = ahead_;
      const unsigned char* const next_row = this->locate(next);
      bool makes = entry.has_tile() || early, makes_first = this->makes_tile_before_q(entry);
#pragma unroll 1
      for (;;) {
        if (entry.begins_piece() && !makes_first) {
          this->begin_piece(entry.piece());
        }
        if (makes) {
          make_tile(entry, raw);
        }
        if (!makes_first) {
          break;
        }
        makes = makes_first = false;
      }
      if (round == 0) {
        wait_for_dependencies();
        early = false;
      }
      this->fetch_indices();
      this->prefetch_next_q();
      row_ = next_row;
      row_in_page_ = next_row_in_page_;
      entry = next;
      if (entry.exists()) {
        fetch_rows(entry, raw);
      }
    } while (++round < 2 || entry.exists());
  }

  // The bytes of the entry's tile, if it has one, whose rows are known.
  __device__ __forceinline__ void fetch_rows(const Entry& entry, uint4 (&raw)[kPasses]) {
    with_format<C>(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const unsigned char* scales = row_ + kLayout.value_bytes();
      if constexpr (kLayout.scales_behind_page) {
        const int page = params_.keys[entry.source()].page;
        const int distance = (page - row_in_page_) * kLayout.row_stride() + row_in_page_ * kLayout.scale_stride();
        scales = row_ + (row_ == kZeroRow ? 0 : distance);
      }
      scales_ = format.load_scales(scales, (kOwnKeys ? 0 : this->rank() * kQuarters) + lane_ % kQuarters);
      const int lane = this->opaque_lane();
      const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        if constexpr (kOwnKeys) {
          format.load(row_of_key(bits, key_of(pass, lane)), unit_of(pass, lane), entry.has_tile(), raw[pass]);
        } else {
          const int key = pass * C::kRanks + lane / kUnits;
          format.load(row_of_key(bits, key), this->rank() * kUnits + lane % kUnits, entry.has_tile(), raw[pass]);
        }
      }
    });
    if constexpr (kRopeQuantised) {
      RowFormat<C::kFormat>::load(row_ + layout_of(C::kFormat).rope_offset(), lane_ % kLanes, entry.has_tile(),
                                  raw_rope_);
    } else if (C::kHasRope && entry.has_tile()) {
      prefetch_l2(row_ + layout_of(C::kFormat).rope_offset());
    }
  }

  const unsigned char* row_ = kZeroRow;  // the lane's, of the tile whose bytes have been fetched
  int row_in_page_;
  QuarterScales scales_;
  uint4 raw_rope_;  // where these columns are quantised too
};

}  // namespace flash_mla::inline device
