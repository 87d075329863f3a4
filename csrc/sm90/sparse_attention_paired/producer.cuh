// The eight producer warps. A CTA brings half of a tile's keys, for both CTAs of the pair: each warp has eight of them,
// and one half of their columns. It brings these as they are in memory into a buffer of its own by asynchronous copies,
// and converts them from there into the places that the math warps of both CTAs have handed back, here and there. As
// soon as it has read the buffer it sends for what comes there next.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"
#include "sm90/sparse_attention_paired/storage.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C>
class ProducerWarp : KeyLists<C, Storage<C>> {
  using Base = KeyLists<C, Storage<C>>;
  using Base::ahead_, Base::index_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::storage_, Base::walk_,
      Base::warp_, Base::kLanes, Base::kWarpKeys;
  static constexpr int kPasses = kWarpKeys / 4;  // of a quarter: four keys at a time

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane),
        to_peer_(peer_address(shared_address(storage.k)) - shared_address(storage.k)) {
    place_.stage = 2 * side();
  }

  __device__ __forceinline__ void run() {
    this->wait_if_early();
    // In the first two rounds there is nothing to convert: the indices, then the bytes of the first tile are sent for.
    Entry entry{0};
    uint32_t valid = 0, next_valid;
    int round = 0;
#pragma unroll 1
    do {
      const Entry next = ahead_;
      next_valid = locate(next);
      fetch_indices();
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece());
      }
      uint4 raw[2][kPasses];
      float scales[2][kPasses];
      // What has been sent for last are RoPE columns.
      async_copy_wait<1>();
      __syncwarp();
      if (entry.has_tile()) {
        read(entry, 0, raw[0], scales[0]);
        read(entry, 1, raw[1], scales[1]);
        __syncwarp();
      }
      if (next.has_tile()) {
        copy_values(next);
      }
      async_copy_commit();
      if (entry.has_tile()) {
        convert<0>(entry, raw[0], scales[0], valid);
        convert<1>(entry, raw[1], scales[1], valid);
      }
      if (C::kHasRope && next.has_tile() && side() == 1) {
        copy_rope();
      }
      async_copy_commit();
      entry = next;
      valid = next_valid;
    } while (++round < 2 || entry.exists());
    this->end();
  }

 private:
  // Which half of the columns.
  __device__ __forceinline__ int side() const { return warp_ / C::kSideWarps; }

  // Leaves where the rows of the warp's keys are, and their scales where these are no part of them, for the copies.
  // Which keys count.
  __device__ __forceinline__ uint32_t locate(const Entry& entry) {
    const unsigned char* row = Base::locate(entry);
    if (lane_ % kLanes == 0) {
      const int key = lane_ / kLanes;
      storage_.rows[warp_][key] = reinterpret_cast<uint64_t>(row);
      with_format<C>(entry, [&](auto format) {
        constexpr KVLayout kLayout = decltype(format)::kLayout;
        if constexpr (kLayout.scales_behind_page) {
          const int page = params_.keys[entry.source()].page, row_in_page = next_row_in_page_;
          const int distance = (page - row_in_page) * kLayout.row_stride() + row_in_page * kLayout.scale_stride();
          storage_.scale_rows[warp_][key] =
              reinterpret_cast<uint64_t>(row + (row == kZeroRow ? kLayout.row_stride() : distance));
        }
      });
    }
    return this->valid_keys(row);
  }

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

  __device__ __forceinline__ void copy_values(const Entry& entry) const {
    with_format<C>(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const int lane = this->opaque_lane(), key = lane / kLanes, part = lane % kLanes * 16;
      const Strip<2 * kLayout.value_bits> values(storage_.rows[warp_], side() * 32 * kLayout.value_bits, lane);
      const uint64_t scales = (kLayout.scales_behind_page ? storage_.scale_rows : storage_.rows)[warp_][key];
      values.copy(storage_.half[warp_], 0);
      const uint32_t place = shared_address(storage_.scales[warp_][key]);
      if constexpr (kLayout.scales_behind_page) {
        if (part == 0) {
          async_copy8(place, reinterpret_cast<const unsigned char*>(scales));
        }
      } else if constexpr (kLayout.scale != ScaleType::kNone) {
        if (part < kLayout.scale_bytes()) {
          async_copy16(place + part, reinterpret_cast<const unsigned char*>(scales) + kLayout.value_bytes() + part);
        }
      }
    });
  }

  // The RoPE columns have one format in both sources.
  __device__ __forceinline__ void copy_rope() const {
    if constexpr (C::kHasRope) {
      constexpr int kOffset = layout_of(C::kFormat).rope_offset();
      Strip<8>(storage_.rows[warp_], kOffset, this->opaque_lane()).copy(storage_.rope[warp_ % C::kSideWarps], 0);
    }
  }

  // A pass takes a quarter of four keys: eight lanes have one of them, and 16 values each: a unit.
  __device__ __forceinline__ void read(const Entry& entry, int quarter, uint4 (&raw)[kPasses],
                                       float (&scales)[kPasses]) const {
    const int lane = this->opaque_lane();
    with_format<C>(entry, [&](auto format) {
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        const int key = 4 * pass + lane / 8, unit = quarter * 8 + lane % 8;
        const unsigned char* bytes = storage_.half[warp_][key];
        if constexpr (decltype(format)::kLayout.value_bits == 8) {
          raw[pass] = *reinterpret_cast<const uint4*>(bytes + unit * 16);
        } else {
          const uint2 half = *reinterpret_cast<const uint2*>(bytes + unit * 8);
          raw[pass] = make_uint4(half.x, half.y, 0, 0);
        }
        scales[pass] = format.scale(storage_.scales[warp_][key], side() * 16 + unit);
      }
    });
  }

  // A quarter goes to the next of the warp's places in the ring, once it is free in both CTAs; with the last one the
  // RoPE columns, with the first one which keys count.
  template <int kQuarter>
  __device__ __forceinline__ void convert(const Entry& entry, const uint4 (&raw)[kPasses],
                                          const float (&scales)[kPasses], uint32_t valid) {
    mbarrier_wait(shared_address(&storage_.k_empty[place_.stage]), place_.parity ^ 1);
    const uint32_t full = shared_address(&storage_.k_full[place_.stage]), peer_full = full + to_peer_;
    const int lane = this->opaque_lane(), unit = (side() * 2 + kQuarter) * 8 + lane % 8, key_in_pass = lane / 8;
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
          store(place, format.eight_of(raw[pass], scales[pass], swapped), peer_full);
          store(place ^ 16, format.eight_of(raw[pass], scales[pass], !swapped), peer_full);
        }
      });
    }
    int bytes = kWarpKeys * 256;
    if constexpr (kQuarter == 1 && C::kHasRope) {
      if (side() == 1) {
        async_copy_wait<1>();
        __syncwarp();
        if constexpr (C::kRopeBehindValues) {
          mbarrier_wait(shared_address(&storage_.tail_empty), tile_parity_ ^ 1);
          store_rope(shared_address(storage_.tail) + this->first_key() * kSliceRowBytes, peer_full);
          bytes += kWarpKeys * kSliceRowBytes;
        } else {
          store_rope(quarter + C::kSliceBytes, peer_full);
        }
      }
    }
    if constexpr (kQuarter == 0) {
      if (side() == 0) {
        bytes += sizeof(valid);
        if (lane_ == 0) {
          uint32_t& word = storage_.valid[tile_parity_][this->rank() * C::kSideWarps + warp_];
          word = valid;
          store_peer(shared_address(&word) + to_peer_, valid, peer_full);
        }
      }
    } else {
      tile_parity_ ^= 1;
    }
    // The readers order the stores before their use by the async proxy. The other CTA stores as much here.
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive_expect_bytes(full, bytes);
    }
    place_.advance();
    if constexpr (kQuarter == 1) {
      place_.advance();
      place_.advance();
    }
  }

  // Here and there.
  __device__ __forceinline__ void store(uint32_t address, const uint4& words, uint32_t peer_full) const {
    store_words(address, words);
    store_peer(address + to_peer_, words.x, words.y, words.z, words.w, peer_full);
  }

  // The RoPE columns as they are, from the buffer to their place.
  __device__ __forceinline__ void store_rope(uint32_t rows, uint32_t peer_full) const {
    const int lane = this->opaque_lane();
#pragma unroll
    for (int i = 0; i < kWarpKeys / 4; ++i) {
      const int key = i * 4 + lane / 8;
      const uint4 words = *reinterpret_cast<const uint4*>(&storage_.rope[warp_ % C::kSideWarps][key][lane % 8 * 16]);
      store(rows + key * kSliceRowBytes + ((lane % 8 ^ key) * 16), words, peer_full);
    }
  }

  const uint32_t to_peer_;  // from an address in shared memory to the same one of the other CTA
  Run run_{};               // with the tiles whose indices are still to be fetched
  uint32_t tile_parity_ = 0;
  Ring<C::kPlaces> place_;  // of the warp's next quarter
};

}  // namespace flash_mla::sm90::sparse_attention_paired
