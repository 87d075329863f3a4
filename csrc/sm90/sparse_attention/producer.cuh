// The eight producer warps. Each brings its eight keys of a tile, as they are in memory, into buffers of its own by
// asynchronous copies, and converts them from there, a quarter of their values after the other, into the places that
// the math warps have handed back. As soon as it has read a buffer it sends for what comes there next.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"
#include "sm90/sparse_attention/storage.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class ProducerWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::ahead_, Base::index_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::storage_, Base::walk_,
      Base::warp_, Base::kLanes, Base::kWarpKeys;
  static constexpr int kPasses = kWarpKeys / 4;                                 // of a quarter: four keys at a time
  static constexpr int kRopeUnits = C::kHasRope && !C::kRopeQuantised ? 2 : 0;  // of 16 bytes, that a lane keeps

  // A tile, and the lane's row of it.
  struct Located {
    Entry entry{0};
    const unsigned char* row = kZeroRow;
    int row_in_page = 0;
  };

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->wait_if_early();
    // In the first two rounds there is nothing to convert: the indices, then the bytes of the first tile are sent for.
    Entry entry{0};
    uint32_t valid = 0;
    int round = 0;
#pragma unroll 1
    do {
      Located next;
      next.entry = ahead_;
      next.row = this->locate(next.entry);
      next.row_in_page = next_row_in_page_;
      if (lane_ % kLanes == 0) {
        storage_.rows[warp_][lane_ / kLanes] = reinterpret_cast<uint64_t>(next.row);
      }
      fetch_indices();
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece());
      }
      uint4 raw[2][kPasses];
      float scales[2][kPasses];
      // What has been sent for last is another part.
      async_copy_wait<1>();
      __syncwarp();
      if (entry.has_tile()) {
        read<0>(entry, raw[0], scales[0]);
        read<1>(entry, raw[1], scales[1]);
        __syncwarp();
      }
      if (next.entry.has_tile()) {
        copy_left(next);
      }
      async_copy_commit();
      if (entry.has_tile()) {
        if (lane_ == 0) {
          storage_.valid[tile_parity_][warp_] = static_cast<unsigned char>(valid);
        }
        wait_for_places();
        convert<0>(entry, raw[0], scales[0]);
        convert<1>(entry, raw[1], scales[1]);
      }
      uint4 rope[kRopeUnits + 1];
      async_copy_wait<1>();
      __syncwarp();
      if (entry.has_tile()) {
        read<2>(entry, raw[0], scales[0]);
        read<3>(entry, raw[1], scales[1]);
        if constexpr (C::kRopeQuantised) {
          convert_rope();
        } else {
          read_rope(rope);
        }
        __syncwarp();
      }
      if (next.entry.has_tile()) {
        copy_right(next);
      }
      async_copy_commit();
      if (entry.has_tile()) {
        wait_for_places();
        convert<2>(entry, raw[0], scales[0]);
        convert<3>(entry, raw[1], scales[1], rope);
      }
      round_parity_ ^= 1;
      entry = next.entry;
      valid = this->valid_keys(next.row);
    } while (++round < 2 || entry.exists());
    this->end();
  }

 private:
  // As the base's, with the run in registers.
  __device__ __forceinline__ void fetch_indices() {
    ahead_ = {0};
    index_ = -1;
    if (run_.num_tiles == 0) {
      if (!this->find_run()) {
        return;
      }
      run_ = walk_.run;
      __syncwarp();
      if (lane_ == 0) {
        walk_.run.num_tiles = 0;
        walk_.run.bits = run_.bits & ~Entry::kBeginsPiece;
      }
    }
    ahead_.bits |= run_.bits;
    const int position = run_.position + this->key_of_lane();
    if (position < run_.length) {
      index_ = this->load_index(run_.list + (params_.from_table ? this->page_of(params_.keys[0], position) : position));
    }
    run_.position += C::kKeys;
    run_.num_tiles -= 1;
    run_.bits &= ~Entry::kBeginsPiece;
    if (params_.from_table) {
      __syncwarp();
      if (lane_ == 0) {
        walk_.run.position = run_.position;
      }
      __syncwarp();
    }
  }

  // `kUnits` units of 16 bytes of each of the warp's rows, from `offset` on: where the lane's are, then their copies. A
  // copy is a barrier to the compiler, and loads between copies would wait for each other.
  template <int kUnits>
  struct Strip {
    static constexpr int kRows = 32 / kUnits, kCopies = kWarpKeys / kRows;
    const unsigned char* source[kCopies];
    int lane;

    __device__ __forceinline__ Strip(const uint64_t (&rows)[kWarpKeys], int offset, int lane) : lane(lane) {
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        source[i] =
            reinterpret_cast<const unsigned char*>(rows[i * kRows + lane / kUnits]) + offset + lane % kUnits * 16;
      }
    }

    template <int kStride>
    __device__ __forceinline__ void copy(unsigned char (&to)[kWarpKeys][kStride], int to_offset) const {
      const uint32_t place = shared_address(to[lane / kUnits]) + to_offset + lane % kUnits * 16;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        async_copy16(place + i * kRows * kStride, source[i]);
      }
    }
  };

  __device__ __forceinline__ void copy_left(const Located& at) const {
    with_format<C>(at.entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      Strip<2 * kLayout.value_bits>(storage_.rows[warp_], 0, this->opaque_lane()).copy(storage_.left[warp_], 0);
      const int key = lane_ / kLanes;
      const uint32_t place = shared_address(storage_.scales[round_parity_ ^ 1][warp_][key]);
      if constexpr (kLayout.scales_behind_page) {
        const int page = params_.keys[at.entry.source()].page;
        const int distance = (page - at.row_in_page) * kLayout.row_stride() + at.row_in_page * kLayout.scale_stride();
        if (lane_ % kLanes == 0) {
          async_copy8(place, at.row + (at.row == kZeroRow ? kLayout.row_stride() : distance));
        }
      } else if constexpr (kLayout.scale != ScaleType::kNone) {
        const int part = lane_ % kLanes * 16;
        if (part < kLayout.scale_bytes()) {
          async_copy16(place + part, at.row + kLayout.value_bytes() + part);
        }
      }
    });
  }

  __device__ __forceinline__ void copy_right(const Located& at) const {
    with_format<C>(at.entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const int lane = this->opaque_lane();
      auto& right = storage_.right[warp_];
      const Strip<2 * kLayout.value_bits> values(storage_.rows[warp_], 32 * kLayout.value_bits, lane);
      if constexpr (C::kHasRope) {
        constexpr int kBehind = C::kRopeInValues ? 512 : layout_of(C::kFormat).rope_offset();
        const Strip<C::kRopeBehindValues && !C::kRopeQuantised ? 8 : 4> rope(storage_.rows[warp_], kBehind, lane);
        values.copy(right, 0);
        rope.copy(right, C::kLeftBytes);
      } else {
        values.copy(right, 0);
      }
    });
  }

  // A pass takes a quarter of four keys: eight lanes have one of them, and 16 values each: a unit.
  template <int kQuarter>
  __device__ __forceinline__ void read(const Entry& entry, uint4 (&raw)[kPasses], float (&scales)[kPasses]) const {
    const int lane = this->opaque_lane();
    with_format<C>(entry, [&](auto format) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = 4 * pass + lane / 8, unit = kQuarter % 2 * 8 + lane % 8;
        const unsigned char* bytes = kQuarter < 2 ? storage_.left[warp_][key] : storage_.right[warp_][key];
        if constexpr (decltype(format)::kLayout.value_bits == 8) {
          raw[pass] = *reinterpret_cast<const uint4*>(bytes + unit * 16);
        } else {
          const uint2 half = *reinterpret_cast<const uint2*>(bytes + unit * 8);
          raw[pass] = make_uint4(half.x, half.y, 0, 0);
        }
        scales[pass] = format.scale(storage_.scales[round_parity_][warp_][key], kQuarter * 8 + lane % 8);
      }
    });
  }

  // For the next two quarters.
  __device__ __forceinline__ void wait_for_places() const {
    Ring<C::kPlaces> place = place_;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      mbarrier_wait(shared_address(&storage_.k_empty[place.stage]), place.parity ^ 1);
      place.advance();
    }
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
          const uint32_t place = (first ^ key * 16) + key * kSliceRowBytes;
          format.convert(raw[pass], scales[pass], swapped, place, place ^ 16);
        }
      });
    }
    if constexpr (kQuarter == 3 && kRopeUnits > 0) {
      if constexpr (C::kRopeBehindValues) {
        mbarrier_wait(shared_address(&storage_.tail_empty), tile_parity_ ^ 1);
        store_rope(rope, shared_address(storage_.tail) + this->first_key() * kSliceRowBytes);
      } else {
        store_rope(rope, quarter + C::kSliceBytes);
      }
    }
    if constexpr (kQuarter == 3) {
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
      rope[i] = *reinterpret_cast<const uint4*>(
          &storage_.right[warp_][i * 4 + lane / 8][(C::kRopeInValues ? 192 : C::kLeftBytes) + lane % 8 * 16]);
    }
  }

  __device__ __forceinline__ void store_rope(const uint4 (&rope)[kRopeUnits + 1], uint32_t rows) const {
    const int lane = this->opaque_lane();
#pragma unroll
    for (int i = 0; i < kRopeUnits; ++i) {
      const int key = i * 4 + lane / 8;
      store_words(rows + key * kSliceRowBytes + ((lane % 8 ^ key) * 16), rope[i]);
    }
  }

  // Those that are e4m3 values too are converted at once, a quarter of a key by a lane: registers do not suffice to
  // keep them.
  __device__ __forceinline__ void convert_rope() const {
    const int lane = this->opaque_lane(), key = lane / 4;
    const uint4 raw = *reinterpret_cast<const uint4*>(&storage_.right[warp_][key][C::kLeftBytes + lane % 4 * 16]);
    const uint32_t place =
        shared_address(storage_.tail) + (this->first_key() + key) * kSliceRowBytes + ((lane % 4 * 2) ^ key) * 16;
    mbarrier_wait(shared_address(&storage_.tail_empty), tile_parity_ ^ 1);
    RowFormat<C::kFormat>::convert(raw, 1, false, place, place ^ 16);
  }

  Run run_{};  // with the tiles whose indices are still to be fetched
  uint32_t round_parity_ = 0;
  uint32_t tile_parity_ = 0;
  Ring<C::kPlaces> place_;  // of the next quarter
};

}  // namespace flash_mla::sm90::sparse_attention
