// The producer warpgroup: a thread for each slot, or one for both, issues TMA loads of whole key tiles; two warps load
// rows by 16-byte copies (Q, the partial tile at a request's end, pages that TMA cannot tile).
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/slots.cuh"
#include "device/sm90/wgmma.cuh"
#include "sm90/dense_decode/pieces.cuh"
#include "sm90/dense_decode/storage.h"

namespace flash_mla::sm90::dense_decode {

// The named barrier at which the row warps meet before the first of them hands over the rows of both: so a full barrier
// takes one arrival, theirs or a TMA thread's.
constexpr int kRowsCopied = 4;

// Which tiles go by TMA: those whose 64 keys all exist, where a page is made of whole boxes.
__device__ __forceinline__ bool by_tma(const DenseDecodeParams& params, const Piece& piece, int tile) {
  return params.box_rows > 0 && (tile + 1) * kScheduleBlock <= piece.seqlen;
}

// One thread's loads: those of tiles in the slots whose bits are set. What it does between a slot's release and the
// next load is time that the slot is empty, so all that can be known before is computed before.
template <class C>
class TmaThread {
 public:
  __device__ __forceinline__ TmaThread(const DenseDecodeParams& params, const CacheMaps& maps, Storage<C>& storage,
                                       const Place& place, int slots)
      : params_(params),
        maps_(maps),
        storage_(storage),
        place_(place),
        boxes_(C::kKeys / params.box_rows),
        slots_(slots),
        policy_(evict_first_policy()) {}

  __device__ __forceinline__ void run() {
    Pieces<true> pieces(params_, place_.part, place_.causal_cut);
    // A piece's first page is looked up together with its length; what a request without keys has there is not used.
    Position ahead = look_ahead(pieces);
    for (Piece piece; pieces.next(piece);) {
      const int32_t* table = params_.block_table + piece.request * params_.stride_table_b;
      Position at = ahead;
      if (at.tile != piece.begin_tile && piece.num_tiles > 0) {
        at = look_up(piece.request, piece.begin_tile);
      }
      ahead = look_ahead(pieces);
#pragma unroll 1
      for (int i = 0; i < piece.num_tiles; ++i) {
        const bool load = by_tma(params_, piece, at.tile);
        Position next = advance(at);
        if (i + 1 < piece.num_tiles && by_tma(params_, piece, next.tile)) {
          next.page = table[next.index];  // arrives while this tile waits for its slot
        }
        if (slots_ >> (i & 1) & 1) {
          issue(i & 1, at, table, load);
        }
        at = next;
      }
    }
  }

 private:
  // Where a tile begins: entry `index` of the block table, which is `page`, and a row of that.
  struct Position {
    int tile, index, row, page;
  };

  __device__ __forceinline__ Position look_up(int request, int tile) const {
    const int key = tile * C::kKeys;
    Position at{tile, params_.page_shift >= 0 ? key >> params_.page_shift : key / params_.page, 0, 0};
    at.row = key - at.index * params_.page;
    if (request < params_.b && at.index < params_.max_pages) {
      at.page = params_.block_table[request * params_.stride_table_b + at.index];
    }
    return at;
  }

  __device__ __forceinline__ Position look_ahead(const Pieces<true>& pieces) const {
    return look_up(pieces.next_request(), pieces.next_begin());
  }

  // A page holds whole tiles, or a tile whole pages. The page stays that of `at`.
  __device__ __forceinline__ Position advance(const Position& at) const {
    const bool same_page = at.row + C::kKeys < params_.page;
    return {at.tile + 1, same_page ? at.index : at.index + boxes_, same_page ? at.row + C::kKeys : 0, at.page};
  }

  __device__ __forceinline__ void issue(int slot, const Position& at, const int32_t* table, bool load) {
    if (!load) {
      // A wait that is left out would make the next one pass a phase too early.
      for_each_group(slot, [](int, uint32_t) {});
      mbarrier_arrive(shared_address(&storage_.row_warps_turn[slot]));
    } else if (boxes_ > 1) {
      for_each_group(slot, [&](int group, uint32_t full) {
        mbarrier_arrive_expect_bytes(full, bytes_of(group));
        load_small_pages(destination_of(slot, group), group, table + at.index, full);
      });
    } else if (params_.num_row_tiles > 1) {  // keys that CTAs share: the usual policy, stated, costs cycles
      slot == 0 ? load_page<false, 0>(at) : load_page<false, 1>(at);
    } else {
      slot == 0 ? load_page<true, 0>(at) : load_page<true, 1>(at);
    }
    phases_.advance(slot);
  }

  // Each group of a slot, once it has been handed back.
  template <class Function>
  __device__ __forceinline__ void for_each_group(int slot, Function&& function) {
#pragma unroll 1
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(slot, order);
      if (C::num_slices(group) > 0) {
        mbarrier_wait(shared_address(&storage_.k_empty[slot][group]), phases_.parity(slot) ^ 1);
        function(group, shared_address(&storage_.k_full[slot][group]));
      }
    }
  }

  // A tile that lies in one page. Nothing is decided between a wait and its load: each branch there, and each address
  // that depends on the slot, is time in which the group is empty.
  template <bool kHinted, int kSlot>
  __device__ __forceinline__ void load_page(const Position& at) {
    const uint32_t parity = phases_.parity(kSlot) ^ 1;
#pragma unroll
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(kSlot, order);
      if (C::num_slices(group) == 0) {
        continue;
      }
      const uint32_t full = shared_address(&storage_.k_full[kSlot][group]), destination = destination_of(kSlot, group);
      const CUtensorMap* map = C::num_slices(group) == 1 ? &maps_.one_slice : &maps_.two_slices;
      const TmaCoordinates from{0, at.row, C::first_slice(group), place_.kv_head, at.page};
      mbarrier_wait(shared_address(&storage_.k_empty[kSlot][group]), parity);
      mbarrier_arrive_expect_bytes(full, bytes_of(group));
      if constexpr (kHinted) {
        tma_load_hinted(destination, map, from, full, policy_);
      } else {
        tma_load(destination, map, from, full);
      }
    }
  }

  __device__ __forceinline__ uint32_t destination_of(int slot, int group) const {
    return shared_address(storage_.k[0]) + slot * C::kTileBytes + C::first_slice(group) * C::kSliceBytes;
  }

  static constexpr uint32_t bytes_of(int group) { return C::num_slices(group) * C::kSliceBytes; }

  // Tiles of several pages.
  __device__ __forceinline__ void load_small_pages(uint32_t destination, int group, const int32_t* table,
                                                   uint32_t full) {
#pragma unroll 1
    for (int i = 0; i < boxes_ * C::num_slices(group); ++i) {
      const int box = i % boxes_, slice = i / boxes_;
      tma_load(destination + slice * C::kSliceBytes + box * params_.box_rows * kSliceRowBytes, &maps_.one_slice,
               {0, 0, C::first_slice(group) + slice, place_.kv_head, table[box]}, full);
    }
  }

  const DenseDecodeParams& params_;
  const CacheMaps& maps_;
  Storage<C>& storage_;
  const Place place_;
  const int boxes_, slots_;
  const uint64_t policy_;  // keys that one CTA alone reads are not to drive partial results out of L2
  SlotPhases phases_;
};

template <class C>
struct RowWarps {
  static constexpr int kRowsPerWarp = C::kRows / kNumRowWarps;

  static __device__ void run(const DenseDecodeParams& params, Storage<C>& storage, const Place& place, int warp,
                             int lane) {
    Pieces<true> pieces(params, place.part, place.causal_cut);
    SlotPhases phases, turns;
    uint32_t q_parity = 1;
    const int first_row = warp * kRowsPerWarp;
    for (Piece piece; pieces.next(piece);) {
      if (piece.num_tiles == 0) {
        continue;
      }
      load_q(params, storage, place, piece.request, first_row, lane, q_parity);
      q_parity ^= 1;
      const int32_t* table = params.block_table + piece.request * params.stride_table_b;
      for (int i = 0; i < piece.num_tiles; ++i) {
        const int slot = i & 1, tile = piece.begin_tile + i;
        if (!by_tma(params, piece, tile)) {
          // The tiles before this one were not these warps': the parity of the slot means nothing to them until the TMA
          // thread, which follows every tile, has seen the slot come free.
          if (params.box_rows > 0) {
            mbarrier_wait(shared_address(&storage.row_warps_turn[slot]), turns.parity(slot));
            turns.advance(slot);
          }
          load_keys(params, storage, place, table, piece.seqlen, tile, slot, phases.parity(slot) ^ 1, first_row, lane);
        }
        phases.advance(slot);
      }
    }
    async_copy_wait<0>();
  }

 private:
  // This warp's rows of a group of slices: 8 lanes a row, 16 bytes each. `source` and `valid` are those of row
  // first_row + lane.
  static __device__ __forceinline__ void copy_slices(uint32_t tile, int first_slice, int num_slices, int first_row,
                                                     int lane, const char* source, bool valid) {
    const int unit = lane % 8;
#pragma unroll 2
    for (int i = 0; i < kRowsPerWarp / 4; ++i) {
      const int from = 4 * i + lane / 8, row = first_row + from;
      const auto row_source =
          reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(source), from));
      const bool row_valid = __shfl_sync(~0u, valid, from);
      const uint32_t destination = tile + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16);
      for (int s = first_slice; s < first_slice + num_slices; ++s) {
        async_copy16(destination + s * C::kSliceBytes, row_source + s * kSliceRowBytes + unit * 16, row_valid);
      }
    }
    async_copy_commit();
  }

  // The copies that both warps have made so far are there for wgmma.
  static __device__ __forceinline__ void hand_over(uint64_t* barrier, int first_row, int lane) {
    fence_async_proxy();
    named_barrier_sync(kRowsCopied, 32 * kNumRowWarps);
    if (first_row == 0 && lane == 0) {
      mbarrier_arrive(shared_address(barrier));
    }
  }

  static __device__ void load_q(const DenseDecodeParams& params, Storage<C>& storage, const Place& place, int request,
                                int first_row, int lane, uint32_t parity) {
    const int row = place.row_tile * C::kRows + first_row + lane;
    const bool valid = row < params.s_q * params.group;
    const int token = row / params.group, head = place.kv_head * params.group + row % params.group;
    const char* source = static_cast<const char*>(params.q);
    if (valid) {
      source += sizeof(typename C::Element) *
                (request * params.stride_q_b + token * params.stride_q_s + head * params.stride_q_h);
    }
    mbarrier_wait(shared_address(&storage.q_empty), parity);
    copy_slices(shared_address(storage.q), 0, C::kSlices, first_row, lane, source, valid);
    async_copy_wait<0>();
    hand_over(&storage.q_full, first_row, lane);
  }

  static __device__ void load_keys(const DenseDecodeParams& params, Storage<C>& storage, const Place& place,
                                   const int32_t* table, int seqlen, int tile, int slot, uint32_t parity, int first_row,
                                   int lane) {
    const int key = tile * C::kKeys + first_row + lane;
    const char* source = static_cast<const char*>(params.k_cache);
    bool valid = key < seqlen;
    if (valid) {
      const int page = table[key / params.page];
      valid = page >= 0 && page < params.num_pages;
      if (valid) {
        source += sizeof(typename C::Element) * (page * params.stride_k_page + key % params.page * params.stride_k_row +
                                                 place.kv_head * params.stride_k_h);
      }
    }
    const uint32_t tile_address = shared_address(storage.k[slot]);
#pragma unroll 1
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(slot, order);
      if (C::num_slices(group) > 0) {
        mbarrier_wait(shared_address(&storage.k_empty[slot][group]), parity);
        copy_slices(tile_address, C::first_slice(group), C::num_slices(group), first_row, lane, source, valid);
      }
    }
    auto finish = [&](int order) {
      const int group = C::load_order(slot, order);
      if (C::num_slices(group) > 0) {
        hand_over(&storage.k_full[slot][group], first_row, lane);
      }
    };
    // Groups of copies end in order, so this hands over the first groups while the last are on their way.
    async_copy_wait<2>();
    finish(0);
    finish(1);
    if constexpr (C::kHasRope) {
      finish(2);
    }
    async_copy_wait<0>();
    if constexpr (!C::kHasRope) {
      finish(2);
    }
    finish(3);
    finish(4);
  }
};

}  // namespace flash_mla::sm90::dense_decode
