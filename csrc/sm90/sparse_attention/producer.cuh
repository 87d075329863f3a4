// The eight producer warps. Each fetches, converts and stores one quarter of the columns of half of a tile's keys, a
// lane 16 values of one key in each of eight passes. The raw bytes of the next tile are on their way, in registers, while
// a tile is converted: a slot that comes free is filled at once. Key indices are fetched two tiles ahead.
#pragma once

#include "device/sm90/barrier.cuh"
#include "device/sm90/copy.cuh"
#include "device/sm90/wgmma.cuh"
#include "sm90/sparse_attention/formats.cuh"
#include "sm90/sparse_attention/pieces.cuh"

namespace flash_mla::sm90::sparse_attention {

// The key slots in the order of use. A step takes slot 0, then slot 1; a piece begins with slot 0, so slots advance on
// their own.
struct SlotPhases {
  uint32_t bits = 0;
  __device__ __forceinline__ uint32_t parity(int slot) const { return bits >> slot & 1; }
  __device__ __forceinline__ void advance(int slot) { bits ^= 1u << slot; }
};

template <class C>
class ProducerWarp {
  static constexpr int kPasses = 8;
  static constexpr int kWarpKeys = C::kKeys / kWarpsPerQuarter;
  static constexpr int kRopeKeys = kWarpKeys / 2;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : params_(params),
        storage_(storage),
        walk_(storage.walks[warp]),
        warp_(warp),
        lane_(lane),
        // Warps of the quarters that come free first are on different schedulers than each other.
        quarter_(warp / 2 == 1 ? 2 : warp / 2 == 2 ? 1 : warp / 2),
        first_key_(warp % 2 * kWarpKeys) {}

  __device__ __forceinline__ void run() {
    if (lane_ == 0) {
      begin_walk(params_, walk_);
    }
    __syncwarp();
    fetch_next();
    Entry entry = ahead_;
    row_ = locate(entry);
    row_in_page_ = next_row_in_page_;
    uint4 raw[kPasses];
    if constexpr (!C::kCopied) {
      fetch_rows<0>(entry, raw);
      fetch_rows<kPasses / 2>(entry, raw);
      fetch_scales(entry);
    }
    fetch_next();
#pragma unroll 1
    while (entry.exists()) {
      // All that has been fetched comes to be known complete here, at once: loads share the few counters that the
      // hardware has for them, so that a wait for one would be a wait for any that follow it.
      const Entry next = ahead_;
      const unsigned char* const next_row = locate(next);
      if (entry.begins_piece()) {
        begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        wait_for_slot(entry.slot(), quarter_);
        publish_valid(entry.slot());
        if (C::kHasRope && copies_rope()) {
          copy_rope(entry.slot());
        }
        if constexpr (C::kCopied) {
          copy_quarter(entry.slot());
        }
      }
      row_ = next_row;
      if constexpr (!C::kCopied) {
        float scales[kPasses];
        spread_scales(entry, scales);
        if (entry.has_tile()) {
          convert<0>(entry, raw, scales);
        }
        fetch_rows<0>(next, raw);
        named_barrier_sync(kFirstProducerBarrier + warp_, 32);  // else the compiler would fetch all behind the rest
        if (entry.has_tile()) {
          convert<kPasses / 2>(entry, raw, scales);
        }
        fetch_rows<kPasses / 2>(next, raw);
        row_in_page_ = next_row_in_page_;
        fetch_scales(next);
        if (entry.has_tile()) {
          // The readers order these stores before their use by the async proxy: here that would cost 400 cycles.
          __syncwarp();
          if (lane_ == 0) {
            mbarrier_arrive(shared_address(&storage_.k_full[entry.slot()][quarter_]));
          }
        }
      }
      if (entry.has_tile()) {
        phases_.advance(entry.slot());
      }
      entry = next;
      fetch_next();
    }
    end();
  }

 private:
  // Steps to the next tile and fetches the lane's index; -1 where its list has ended.
  __device__ __forceinline__ void fetch_next() {
    if (walk_.run.num_tiles == 0) {
      int found = 1;
      if (lane_ == 0) {
        if (walk_.second_tiles > 0) {
          begin_second_run(params_, walk_);
        } else {
          found = next_piece(params_, walk_);
        }
      }
      found = __shfl_sync(~0u, found, 0);
      __syncwarp();
      ahead_ = {found ? walk_.run.bits : 0};
      index_ = -1;
      if (!ahead_.has_tile()) {
        return;
      }
    }
    const Run run = walk_.run;
    ahead_ = {run.bits};
    const int position = run.position + first_key_ + lane_;
    index_ = -1;
    if (position < run.length) {
      index_ = load_index(run.list + (params_.from_table ? page_of(params_.keys[0], position) : position));
    }
    __syncwarp();
    if (lane_ == 0) {
      walk_.run.position = run.position + C::kKeys;
      walk_.run.num_tiles = run.num_tiles - 1;
      walk_.run.bits = (run.bits ^ Entry::kSlot) & ~Entry::kBeginsPiece;
    }
    __syncwarp();
  }

  static __device__ __forceinline__ int load_index(const int32_t* address) {
    int index;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(index) : "l"(address));
    return index;
  }

  static __device__ __forceinline__ int page_of(const KeySource& keys, int slot) {
    return keys.page_shift >= 0 ? slot >> keys.page_shift : static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(keys.page));
  }

  // The lane's row of the tile whose indices have been fetched.
  __device__ __forceinline__ const unsigned char* locate(const Entry& entry) {
    const KeySource& keys = params_.keys[entry.source()];
    int page;
    if (params_.from_table) {
      const int position = walk_.run.position - C::kKeys + first_key_ + lane_;  // its fetching was the last step
      page = index_;
      next_row_in_page_ = position - page_of(keys, position) * keys.page;
      if (index_ < 0 || index_ >= static_cast<int>(keys.num_slots / static_cast<uint32_t>(keys.page))) {
        return kZeroRow;
      }
    } else {
      if (static_cast<uint32_t>(index_) >= keys.num_slots) {
        return kZeroRow;
      }
      page = page_of(keys, index_);
      next_row_in_page_ = index_ - page * keys.page;
    }
    const unsigned char* base = static_cast<const unsigned char*>(keys.cache) + page * keys.stride_page;
    return base + next_row_in_page_ * (C::kFormat == KVFormat::kModel1 ? layout_of(C::kFormat).row_stride() : keys.stride_row);
  }

  static constexpr bool kTwoFormats = C::kExtraFormat != KVFormat::kNone && C::kExtraFormat != C::kFormat;
  static constexpr KVFormat kSecond = kTwoFormats ? C::kExtraFormat : C::kFormat;
  static __device__ __forceinline__ bool is_extra_format(const Entry& entry) { return kTwoFormats && entry.source(); }

  // A lane's share of a pass: one unit of 16 values of one of four rows.
  struct Lanes {
    unsigned lane;
    // The compiler is to compute what follows from the lane for each tile anew: kept, it would be spilled.
    __device__ __forceinline__ explicit Lanes(int lane_) : lane(lane_) { asm volatile("" : "+r"(lane)); }
    __device__ __forceinline__ int unit() const { return static_cast<int>(lane % 4 + lane / 16 * 4); }
    __device__ __forceinline__ int row() const { return static_cast<int>(lane / 4 % 4); }
  };

  // Whether the lane's columns are converted: the last ones of MODEL1 are not.
  __device__ __forceinline__ bool converts(const Lanes& lanes) const {
    return !C::kRopeInValues || quarter_ != 3 || lanes.lane < 16;
  }

  // Calls `function` with the format of the entry's source.
  template <class Function>
  __device__ __forceinline__ void with_format(const Entry& entry, Function&& function) const {
    if (is_extra_format(entry)) {
      function(RowFormat<kSecond>());
    } else {
      function(RowFormat<C::kFormat>());
    }
  }

  // Half of the passes, from kFirst on.
  template <int kFirst>
  __device__ __forceinline__ void fetch_rows(const Entry& entry, uint4 (&raw)[kPasses]) const {
    with_format(entry, [&](auto format) {
      const Lanes lanes(lane_);
      const auto bits = reinterpret_cast<uintptr_t>(row_);
#pragma unroll
      for (int pass = kFirst; pass < kFirst + kPasses / 2; ++pass) {
        const auto row = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, 4 * pass + lanes.row()));
        raw[pass] = format.load(row, quarter_, lanes.unit());
      }
    });
  }

  __device__ __forceinline__ void fetch_scales(const Entry& entry) {
    scales_ = {};
    if (row_ == kZeroRow) {
      return;
    }
    with_format(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const unsigned char* scales = row_ + kLayout.value_bytes();
      if constexpr (kLayout.scales_behind_page) {
        const int page = params_.keys[entry.source()].page;
        scales = row_ + (page - row_in_page_) * kLayout.row_stride() + row_in_page_ * kLayout.scale_stride();
      }
      scales_ = format.load_scales(scales, quarter_);
    });
    if (C::kHasRope && quarter_ == 3) {
      prefetch_l2(row_ + layout_of(C::kFormat).rope_offset());
    }
  }

  // The scale of each pass's unit.
  __device__ __forceinline__ void spread_scales(const Entry& entry, float (&scales)[kPasses]) const {
    with_format(entry, [&](auto format) {
      const Lanes lanes(lane_);
#pragma unroll
      for (int pass = 0; pass < kPasses; ++pass) {
        scales[pass] = format.scale(scales_, 4 * pass + lanes.row(), lanes.unit());
      }
    });
  }

  template <int kFirst>
  __device__ __forceinline__ void convert(const Entry& entry, const uint4 (&raw)[kPasses],
                                          const float (&scales)[kPasses]) const {
    const Lanes lanes(lane_);
    if (!converts(lanes)) {
      return;
    }
    // Where the lane's first unit of the first pass goes. A row's units are permuted by row % 8, which is
    // lanes.row() + pass % 2 * 4.
    const uint32_t base = shared_address(storage_.k[0]) + entry.slot() * C::kTileBytes +
                          (2 * quarter_ + lanes.lane / 16) * C::kSliceBytes + (first_key_ + lanes.row()) * kSliceRowBytes +
                          ((lanes.lane % 4 * 2 ^ lanes.row()) * 16);
    with_format(entry, [&](auto format) {
#pragma unroll
      for (int pass = kFirst; pass < kFirst + kPasses / 2; ++pass) {
        format.convert(raw[pass], scales[pass], (base ^ pass % 2 * 64) + pass * 4 * kSliceRowBytes,
                       (base ^ 16 ^ pass % 2 * 64) + pass * 4 * kSliceRowBytes);
      }
    });
  }

  // Every quarter's warps know which keys are valid; one of them says so.
  __device__ __forceinline__ void publish_valid(int slot) {
    const uint32_t valid = __ballot_sync(~0u, row_ != kZeroRow);
    if (quarter_ == 0 && lane_ == 0) {
      storage_.valid[slot][warp_ % 2] = valid;
    }
  }

  __device__ __forceinline__ void wait_for_slot(int slot, int group) const {
    mbarrier_wait(shared_address(&storage_.k_empty[slot][group]), phases_.parity(slot) ^ 1);
  }

  // Sixteen keys of the 64 RoPE columns, by the warps of the quarters that come free last.
  __device__ __forceinline__ bool copies_rope() const { return quarter_ % 2 == 1; }

  __device__ __forceinline__ void copy_rope(int slot) const {
    wait_for_slot(slot, kRope);
    constexpr int kOffset = C::kCopied ? 2 * kHeadDimV : layout_of(C::kFormat).rope_offset();
    const uint32_t slice =
        shared_address(storage_.k[0]) + slot * C::kTileBytes + C::kRopeSlice * C::kSliceBytes;
    const int lane = Lanes(lane_).lane;
#pragma unroll
    for (int i = 0; i < kRopeKeys / 4; ++i) {
      const int from = quarter_ / 2 * kRopeKeys + i * 4 + lane / 8, key = first_key_ + from, part = lane % 8;
      const auto source =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(row_), from));
      async_copy16(slice + key * kSliceRowBytes + ((part ^ (key & 7)) * 16), source + kOffset + part * 16);
    }
    async_copy_arrive(shared_address(&storage_.k_full[slot][kRope]));
  }

  // Rows of bfloat16 as they are.
  __device__ __forceinline__ void copy_quarter(int slot) const {
    const uint32_t slice =
        shared_address(storage_.k[0]) + slot * C::kTileBytes + 2 * quarter_ * C::kSliceBytes;
#pragma unroll 4
    for (int i = 0; i < kWarpKeys / 2; ++i) {
      const int from = 2 * i + lane_ / 16, key = first_key_ + from, part = lane_ % 16;
      const auto source =
          reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(row_), from));
      async_copy16(slice + part / 8 * C::kSliceBytes + key * kSliceRowBytes + ((part % 8 ^ (key & 7)) * 16),
                   source + quarter_ * 256 + part * 16);
    }
    async_copy_arrive(shared_address(&storage_.k_full[slot][quarter_]));
  }

  // Hands the facts and Q of a piece over, once the math warps have done with those of the piece before.
  __device__ __forceinline__ void begin_piece(int piece) {
    const PieceFacts& facts = walk_.pending[piece];
    mbarrier_wait(shared_address(&storage_.q_empty), (piece & 1) ^ 1);
    if (warp_ == 0 && lane_ == 0) {
      storage_.pieces[piece & 1] = facts;
    }
    if (facts.num_tiles > 0) {
      load_q(facts);
    }
    async_copy_arrive(shared_address(&storage_.q_full));
  }

  // A warp loads eight rows of Q, zeros where there is no row.
  __device__ __forceinline__ void load_q(const PieceFacts& facts) const {
    const int lane = Lanes(lane_).lane, tile_row = warp_ * 8 + lane / 4;
    const int row = facts.row_tile * C::kRows + tile_row;
    const bool valid = row < params_.unit_rows;
    const auto* source = static_cast<const unsigned char*>(params_.q);
    if (valid) {
      const int unit_row = facts.unit * params_.unit_rows + row;
      const int batch = facts.request / params_.tokens_per_batch,
                token = facts.request % params_.tokens_per_batch + unit_row / params_.h_q;
      source += 2 * (batch * params_.stride_q_b + token * params_.stride_q_s + unit_row % params_.h_q * params_.stride_q_h);
    }
    source += lane % 4 * 16;
    uint32_t destination =
        shared_address(storage_.q) + tile_row * kSliceRowBytes + ((lane % 4 ^ tile_row % 8) * 16);
#pragma unroll 1
    for (int slice = 0; slice < C::kSlices; ++slice) {
      async_copy16(destination, source, valid);
      async_copy16(destination ^ 64, source + 64, valid);
      destination += C::kSliceBytes;
      source += kSliceRowBytes;
    }
  }

  __device__ __forceinline__ void end() {
    const int piece = walk_.num_pieces;
    mbarrier_wait(shared_address(&storage_.q_empty), (piece & 1) ^ 1);
    if (warp_ == 0 && lane_ == 0) {
      storage_.pieces[piece & 1].num_tiles = -1;
    }
    async_copy_arrive(shared_address(&storage_.q_full));
    async_copy_wait<0>();
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  Walk& walk_;
  const int warp_, lane_, quarter_, first_key_;
  SlotPhases phases_;
  Entry ahead_;     // of the indices that have been fetched
  int index_;
  const unsigned char* row_;  // the lane's, of the tile whose bytes have been fetched
  int row_in_page_, next_row_in_page_;
  QuarterScales scales_;
};

}  // namespace flash_mla::sm90::sparse_attention
