// The producers where rows are converted. Two index warps walk the lists and find the rows of the tiles to come; two
// query warps hand over what begins a piece; groups of four converting warps have sixteen keys of a tile, whose bytes
// pass through registers.
#pragma once

#include <type_traits>

#include "device/few_rows/producer.cuh"
#include "sm90/sparse_attention_few_heads/config.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

// As if the index warps were all producer warps that there are.
template <class C>
struct IndexConfig : C {
  static constexpr int kProducerWarps = C::kIndexWarps;
};

// Tells the converting warps where the rows of its half of each tile's keys are.
template <class C>
class IndexWarp : KeyLists<IndexConfig<C>, Storage<C>> {
  using Base = KeyLists<IndexConfig<C>, Storage<C>>;
  using Base::ahead_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::storage_, Base::walk_, Base::warp_;

 public:
  __device__ __forceinline__ IndexWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks.walks[warp], warp, lane) {}

  __device__ __forceinline__ void run() {
    this->wait_if_early();
    this->fetch_indices();
    auto& feed = storage_.walks;
    Ring<C::Feed::kStages> ring;
    Entry entry;
#pragma unroll 1
    do {
      entry = ahead_;
      const unsigned char* const row = this->locate(entry);
      const int row_in_page = next_row_in_page_;
      if (entry.exists()) {
        this->fetch_indices();
      }
      auto& tile = feed.tiles[ring.stage];
      mbarrier_wait(shared_address(&feed.empty[ring.stage]), ring.parity ^ 1);
      tile.rows[this->key_of_lane()] = row;
      if constexpr (C::kScalesBehindPage) {
        constexpr KVLayout kLayout = layout_of(C::kFormat);
        const int page = params_.keys[entry.source()].page;
        const int distance = (page - row_in_page) * kLayout.row_stride() + row_in_page * kLayout.scale_stride();
        tile.scales[this->key_of_lane()] = row == kZeroRow ? kLayout.row_stride() : distance;
      }
      const uint32_t valid = __ballot_sync(~0u, row != kZeroRow);
      if (lane_ == 0) {
        tile.valid[warp_] = valid;
      }
      if (warp_ == 0 && lane_ == 0) {
        // Behind the last tile: how many pieces there were.
        tile.entry = entry.exists() ? entry.bits : static_cast<uint32_t>(walk_.num_pieces % 4) << Entry::kPieceShift;
        if (entry.begins_piece()) {
          tile.facts = walk_.pending[entry.piece()];
        }
      }
      __syncwarp();
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&feed.full[ring.stage]));
      }
      ring.advance();
    } while (entry.exists());
    // Groups that have no quarter of what tells them of the end look for it one further.
    mbarrier_wait(shared_address(&feed.empty[ring.stage]), ring.parity ^ 1);
    if (lane_ == 0) {
      feed.tiles[ring.stage].entry = 0;
      mbarrier_arrive(shared_address(&feed.full[ring.stage]));
    }
  }
};

// As if the query warps were those of all producer warps that have rows of Q.
template <class C>
struct QueryConfig : C {
  static constexpr int kProducerWarps = C::kKeys * C::kQueryWarps / C::kRows;
};

// Hands over the facts and Q of each piece.
template <class C>
class QueryWarp : KeyLists<QueryConfig<C>, Storage<C>> {
  using Base = KeyLists<QueryConfig<C>, Storage<C>>;
  using Base::lane_, Base::storage_;

 public:
  __device__ __forceinline__ QueryWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks.walks[0], warp, lane, typename Base::IsTold()) {}

  __device__ __forceinline__ void run() {
    wait_for_dependencies();
    auto& feed = storage_.walks;
    Ring<C::Feed::kStages> ring;
    Entry entry;
#pragma unroll 1
    do {
      mbarrier_wait(shared_address(&feed.full[ring.stage]), ring.parity);
      const auto& tile = feed.tiles[ring.stage];
      entry = {tile.entry};
      if (entry.begins_piece()) {
        this->begin_piece(entry.piece(), tile.facts, [this](const PieceFacts& facts) { this->load_q(facts); });
      }
      __syncwarp();
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&feed.empty[ring.stage]));
      }
      ring.advance();
    } while (entry.exists());
    this->end(entry.piece());
  }
};

// The warps of a group have four keys each of a quarter of a tile. A pair of keys of the group's next quarter is sent
// for as soon as that pair of this one is converted. What is on its way is waited for where a round begins: loads share
// a counter.
//
// Slots are taken by turns, whatever piece a tile is of, and a piece without tiles takes one too. So a group has part
// in one of two tiles at least, and when it comes to a tile it has waited for the slot of one of the two before, or
// there is none: all releases of this tile's slot but the last are behind it, and the parity tells of that one.
template <class C>
class ConvertingWarp {
  static_assert(C::kGroups <= 2 * C::kQuarters, "a group would miss two tiles in a row");
  static constexpr int kWarpKeys = C::kWarpKeys, kPairs = kWarpKeys / 2, kStages = C::Feed::kStages;
  // Lanes that have 16 bytes each of a row's RoPE columns.
  static constexpr int kRopeLanes = !(C::kRopeBehindValues || C::kRopeInValues) ? 0
                                    : C::kFormat == KVFormat::kE4m3             ? 4
                                                                                : 8;

 public:
  __device__ __forceinline__ ConvertingWarp(const SparseAttentionParams&, Storage<C>& storage, int warp, int lane)
      : storage_(storage),
        feed_(storage.walks),
        warp_(warp),
        lane_(lane),
        place_(shared_address(storage.k[0]) + lane / 4 * C::kSliceBytes +
               warp % C::kGroupWarps * kWarpKeys * kSliceRowBytes +
               (lane % 4 * 2 ^ lane / 4 % 2 ^ warp * kWarpKeys % 8) * 16) {}

  __device__ __forceinline__ void run() {
    wait_for_dependencies();
    // In the first round there is nothing to convert.
    Entry entry{0};
    uint32_t valid = 0;
    Unit units[kPairs][2] = {};
    uint4 rope{};
#pragma unroll 1
    for (uint32_t number = warp_ / C::kGroupWarps;; number += C::kGroups) {  // of the next quarter
      const uint32_t next_number_of_tile = number / C::kQuarters, stage = next_number_of_tile % kStages;
      mbarrier_wait(shared_address(&feed_.full[stage]), next_number_of_tile / kStages % 2);
      const auto& next_tile = feed_.tiles[stage];
      const Entry next{__shfl_sync(~0u, next_tile.entry, 0)};
      const int next_key = (number % C::kQuarters * C::kGroupWarps + warp_ % C::kGroupWarps) * kWarpKeys;
      const uint32_t number_of_tile = (number - C::kGroups) / C::kQuarters, slot = number_of_tile % 2,
                     quarter = (number - C::kGroups) % C::kQuarters;
      if (entry.exists()) {
        mbarrier_wait(shared_address(&storage_.k_empty[slot]), number_of_tile / 2 % 2 ^ 1);
        if (lane_ == 0) {
          storage_.valid[slot][quarter * C::kGroupWarps + warp_ % C::kGroupWarps] = valid;
        }
      }
      valid = next_tile.valid[next_key / 32] >> (next_key % 32) & ((1 << kWarpKeys) - 1);
      const uint32_t place = slot * C::kTileBytes + quarter * (C::kGroupWarps * kWarpKeys * kSliceRowBytes);
#pragma unroll
      for (int pair = 0; pair < kPairs; ++pair) {
        const ulonglong2 rows = *reinterpret_cast<const ulonglong2*>(&next_tile.rows[next_key + 2 * pair]);
        int2 scales{};
        if constexpr (C::kScalesBehindPage) {
          scales = *reinterpret_cast<const int2*>(&next_tile.scales[next_key + 2 * pair]);
        }
        if (entry.has_tile()) {
          convert(entry, place_ + place, pair, units[pair]);
        }
        load(next, rows.x, scales.x, units[pair][0]);
        load(next, rows.y, scales.y, units[pair][1]);
        __syncwarp();  // keeps ptxas from issuing the loads later
      }
      if constexpr (kRopeLanes > 0) {
        if (entry.has_tile()) {
          store_rope(place, rope);
        }
        const unsigned char* row = next_tile.rows[next_key + lane_ / kRopeLanes % kWarpKeys];
        load_words_if(next.has_tile() && lane_ < kWarpKeys * kRopeLanes,
                      row + layout_of(C::kFormat).rope_offset() + lane_ % kRopeLanes * 16, rope);
      }
      __syncwarp();
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&feed_.empty[stage]));
        if (entry.exists()) {
          // The readers order the stores before their use by the async proxy.
          mbarrier_arrive(shared_address(&storage_.k_full[slot]));
        }
      }
      entry = next;
      if (!entry.exists()) {
        break;
      }
    }
  }

 private:
  // Sixteen values of a row and their scale, as they are in memory.
  struct Unit {
    uint4 raw;
    uint32_t scale;
  };

  // `scales_behind`: bytes from the row to its scales, where they do not follow its values.
  __device__ __forceinline__ void load(const Entry& next, uint64_t row_bits, int scales_behind, Unit& unit) const {
    with_format<C>(next, [&](auto format) {
      using Row = decltype(format);
      constexpr KVLayout kLayout = Row::kLayout;
      const auto* row = reinterpret_cast<const unsigned char*>(row_bits);
      Row::load(row, lane_, next.has_tile() && has_values(), unit.raw);
      if constexpr (kLayout.scale != ScaleType::kNone) {
        load_scale<kLayout>(row + (C::kScalesBehindPage ? scales_behind : kLayout.value_bytes()), next.has_tile(),
                            unit.scale);
      }
    });
  }

  template <KVLayout kLayout>
  __device__ __forceinline__ void load_scale(const unsigned char* scales, bool wanted, uint32_t& scale) const {
    const int index = lane_ / (kLayout.group / 16);
    if constexpr (kLayout.scale == ScaleType::kFloat32) {
      asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %2, 0;\n@wanted ld.global.u32 %0, [%1];\n}"
                   : "+r"(scale)
                   : "l"(scales + index * 4), "r"(static_cast<int>(wanted)));
    } else {
      asm volatile("{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %2, 0;\n@wanted ld.global.u8 %0, [%1];\n}"
                   : "+r"(scale)
                   : "l"(scales + index), "r"(static_cast<int>(wanted)));
    }
  }

  // The last lanes have no values where the RoPE columns are among these.
  __device__ __forceinline__ bool has_values() const { return !C::kRopeInValues || lane_ < 28; }

  __device__ __forceinline__ void convert(const Entry& entry, uint32_t keys, int pair, const Unit (&units)[2]) const {
    with_format<C>(entry, [&](auto format) {
      using Row = decltype(format);
      if (has_values()) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          // A key's number is both in the row and in how its units are permuted; no other bits are where these are.
          const int key = 2 * pair + i;
          const uint32_t place = keys ^ (key * kSliceRowBytes + key * 16);
          Row::convert(units[i].raw, scale_of_bits<Row::kLayout.scale>(units[i].scale), lane_ & 4, place, place ^ 16);
        }
      }
    });
  }

  // `keys`: from the first slot's first key to the warp's group's.
  __device__ __forceinline__ void store_rope(uint32_t keys, const uint4& rope) const {
    const int first_key = warp_ % C::kGroupWarps * kWarpKeys, key = lane_ / kRopeLanes, unit = lane_ % kRopeLanes,
              permuted = first_key % 8 ^ key;
    const uint32_t row =
        shared_address(storage_.k[0]) + keys + C::kRopeSlice * C::kSliceBytes + (first_key + key) * kSliceRowBytes;
    if constexpr (C::kFormat == KVFormat::kE4m3) {
      if (key < kWarpKeys) {
        const uint32_t place = row + (unit * 2 ^ permuted) * 16;
        RowFormat<C::kFormat>::convert(rope, 1, false, place, place ^ 16);
      }
    } else {
      store_words(row + (unit ^ permuted) * 16, rope);
    }
  }

  Storage<C>& storage_;
  typename C::Feed& feed_;
  const int warp_, lane_;
  const uint32_t place_;  // in the first slot's first quarter: of the lane's first values of the first pair
};

template <class C>
using ProducerWarp = std::conditional_t<C::kCopied, CopyingWarp<C, Storage<C>>, ConvertingWarp<C>>;

}  // namespace flash_mla::sm90::sparse_attention_few_heads
