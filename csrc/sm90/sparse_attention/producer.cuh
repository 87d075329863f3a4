// The eight producer warps. Each fetches, converts and stores eight keys of a tile, one in each of eight passes. The
// raw bytes of the next tile are on their way, in registers, while a slot is waited for. Key indices are fetched two
// tiles ahead.
#pragma once

#include "device/sm90/barrier.cuh"
#include "device/sm90/copy.cuh"
#include "device/sm90/slots.cuh"
#include "device/sm90/wgmma.cuh"
#include "sm90/sparse_attention/formats.cuh"
#include "sm90/sparse_attention/pieces.cuh"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class ProducerWarp {
  static constexpr int kPasses = 8;

 public:
  __device__ __forceinline__ ProducerWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : params_(params), storage_(storage), walk_(storage.walks[warp]), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void run() {
    if (lane_ == 0) {
      begin_walk(params_, walk_);
    }
    __syncwarp();
    // In the first two rounds there is nothing to convert: the indices, then the bytes of the first tile are fetched.
    // So there is one copy of all this in the code, whose fetching costs small calls much of their time.
    Entry entry{0};
    ahead_ = {0};
    index_ = -1;
    row_ = kZeroRow;
    uint4 raw[kPasses];
    int round = 0;
#pragma unroll 1
    do {
      // All that has been fetched comes to be known complete here, at once: loads share the few counters that the
      // hardware has for them, so that a wait for one would be a wait for any that follow it.
      const Entry next = ahead_;
      const unsigned char* const next_row = locate(next);
      if (entry.begins_piece()) {
        begin_piece(entry.piece());
      }
      if (entry.has_tile()) {
        const int slot = entry.slot();
        mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
        publish_valid(slot);
        copy_columns(slot);
        if constexpr (!C::kCopied) {
          convert(entry, raw);
          // The readers order these stores before their use by the async proxy: here that would cost 400 cycles.
          __syncwarp();
          if (lane_ == 0) {
            mbarrier_arrive(shared_address(&storage_.k_full[slot][kValues]));
          }
        }
        phases_.advance(slot);
      }
      fetch_indices();
      row_ = next_row;
      row_in_page_ = next_row_in_page_;
      entry = next;
      if (entry.exists()) {
        fetch_rows(entry, raw);
      }
    } while (++round < 2 || entry.exists());
    end();
  }

 private:
  // Steps to the next tile and fetches the lane's index; -1 where its list has ended.
  __device__ __forceinline__ void fetch_indices() {
    if (walk_.run.num_tiles == 0) {
      __syncwarp();
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
    const int position = run.position + key_of_lane();
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

  // Four lanes know a key each: where its row is, and the scales of a quarter of it.
  __device__ __forceinline__ int key_of_lane() const { return warp_ * kPasses + lane_ / 4; }

  static __device__ __forceinline__ int load_index(const int32_t* address) {
    int index;
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(index) : "l"(address));
    return index;
  }

  static __device__ __forceinline__ int page_of(const KeySource& keys, int slot) {
    return keys.page_shift >= 0 ? slot >> keys.page_shift
                                : static_cast<int>(static_cast<unsigned>(slot) / static_cast<unsigned>(keys.page));
  }

  // The lane's row of the tile whose indices have been fetched.
  __device__ __forceinline__ const unsigned char* locate(const Entry& entry) {
    const KeySource& keys = params_.keys[entry.source()];
    int page;
    if (params_.from_table) {
      const int position = walk_.run.position - C::kKeys + key_of_lane();  // its fetching was the last step
      page = index_;
      next_row_in_page_ = position - page_of(keys, position) * keys.page;
      if (static_cast<uint32_t>(index_) >= keys.num_slots / static_cast<uint32_t>(keys.page)) {
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
    return base +
           next_row_in_page_ * (C::kFormat == KVFormat::kModel1 ? layout_of(C::kFormat).row_stride() : keys.stride_row);
  }

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

  // The compiler is to compute what follows from the lane for each tile anew: kept, it would be spilled.
  __device__ __forceinline__ int opaque_lane() const {
    int lane = lane_;
    asm volatile("" : "+r"(lane));
    return lane;
  }

  // The bytes of a tile whose rows are known.
  __device__ __forceinline__ void fetch_rows(const Entry& entry, uint4 (&raw)[kPasses]) {
    if constexpr (!C::kCopied) {
      with_format(entry, [&](auto format) {
        constexpr KVLayout kLayout = decltype(format)::kLayout;
        const unsigned char* scales = row_ + kLayout.value_bytes();
        if constexpr (kLayout.scales_behind_page) {
          const int page = params_.keys[entry.source()].page;
          const int distance = (page - row_in_page_) * kLayout.row_stride() + row_in_page_ * kLayout.scale_stride();
          scales = row_ + (row_ == kZeroRow ? 0 : distance);
        }
        scales_ = format.load_scales(scales, lane_ % 4);
        const int lane = opaque_lane();
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
  }

  __device__ __forceinline__ void convert(const Entry& entry, const uint4 (&raw)[kPasses]) const {
    with_format(entry, [&](auto format) {
      const int lane = opaque_lane();
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
    const uint32_t lanes = __ballot_sync(~0u, row_ != kZeroRow);
    const uint32_t own = __ballot_sync(~0u, lane_ < kPasses && (lanes >> (4 * lane_ & 31) & 1));
    if (lane_ == 0) {
      storage_.valid[slot][warp_] = static_cast<unsigned char>(own);
    }
  }

  // What is not converted goes straight to its place.
  __device__ __forceinline__ void copy_columns(int slot) const {
    const int lane = opaque_lane();
    const uint32_t tile = shared_address(storage_.k[0]) + slot * C::kTileBytes + warp_ * kPasses * kSliceRowBytes;
    const auto bits = reinterpret_cast<uintptr_t>(row_);
    if constexpr (C::kHasRope) {
      constexpr int kOffset = C::kCopied ? 2 * kHeadDimV : layout_of(C::kFormat).rope_offset();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int key = i * 4 + lane / 8, part = lane % 8;
        const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, 4 * key));
        async_copy16(tile + C::kRopeSlice * C::kSliceBytes + key * kSliceRowBytes + ((part ^ key) * 16),
                     source + kOffset + part * 16);
      }
      async_copy_arrive(shared_address(&storage_.k_full[slot][kRope]));
    }
    if constexpr (C::kCopied) {
#pragma unroll 2
      for (int key = 0; key < kPasses; ++key) {
        const auto source = reinterpret_cast<const unsigned char*>(__shfl_sync(~0u, bits, 4 * key)) + lane * 16;
        const uint32_t place = tile + lane / 8 * C::kSliceBytes + key * kSliceRowBytes + ((lane % 8 ^ key) * 16);
        async_copy16(place, source);
        async_copy16(place + 4 * C::kSliceBytes, source + 512);
      }
      async_copy_arrive(shared_address(&storage_.k_full[slot][kValues]));
    }
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
    const int lane = opaque_lane(), tile_row = warp_ * 8 + lane / 4;
    const int row = facts.row_tile * C::kRows + tile_row;
    const bool valid = row < params_.unit_rows;
    const auto* source = static_cast<const unsigned char*>(params_.q);
    if (valid) {
      const int unit_row = facts.unit * params_.unit_rows + row;
      const int batch = facts.request / params_.tokens_per_batch,
                token = facts.request % params_.tokens_per_batch + unit_row / params_.h_q;
      source +=
          2 * (batch * params_.stride_q_b + token * params_.stride_q_s + unit_row % params_.h_q * params_.stride_q_h);
    }
    source += lane % 4 * 16;
    uint32_t destination = shared_address(storage_.q) + tile_row * kSliceRowBytes + ((lane % 4 ^ tile_row % 8) * 16);
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
  const int warp_, lane_;
  SlotPhases phases_;
  Entry ahead_;  // of the indices that have been fetched
  int index_;
  const unsigned char* row_;  // the lane's, of the tile whose bytes have been fetched
  int row_in_page_, next_row_in_page_;
  QuarterScales scales_;
};

}  // namespace flash_mla::sm90::sparse_attention
