// The producer warpgroup: one warp issues TMA loads of whole key tiles, two load rows by 16-byte copies (Q, the partial tile at a request's end, pages that TMA cannot tile), one
// prefetches into L2.
#pragma once

#include "device/sm90/barrier.cuh"
#include "device/sm90/copy.cuh"
#include "sm90/dense_decode/pieces.cuh"
#include "sm90/dense_decode/storage.h"

namespace flash_mla::sm90::dense_decode {

using namespace device;

// A full barrier of a key group takes one arrival from each of the two row warps, or both from the TMA warp.
constexpr int kFullArrivals = kNumRowWarps;

// Which tiles go by TMA: those whose 64 keys all exist, where a page is made of whole boxes.
__device__ __forceinline__ bool by_tma(const DenseDecodeParams& params, const Piece& piece, int tile) {
  return params.box_rows > 0 && (tile + 1) * kScheduleBlock <= piece.seqlen;
}

// The key slots in the order of use. A step takes slot 0, then slot 1; a piece begins with slot 0, so slots advance on their own.
struct SlotPhases {
  uint32_t bits = 0;
  __device__ __forceinline__ uint32_t parity(int slot) const { return bits >> slot & 1; }
  __device__ __forceinline__ void advance(int slot) { bits ^= 1u << slot; }
};

template <class C>
struct TmaWarp {
  static __device__ void run(const DenseDecodeParams& params, const CUtensorMap& map, Storage<C>& storage, const Place& place, int lane) {
    if (params.box_rows == 0) {
      return;
    }
    const int boxes = C::kKeys / params.box_rows;  // per slice; one lane each
    Pieces pieces(params, place.part, place.causal_cut);
    SlotPhases phases;
    int issued = 0;
    for (Piece piece; pieces.next(piece);) {
      const int32_t* table = params.block_table + piece.request * params.stride_table_b;
      for (int i = 0; i < piece.num_tiles; ++i) {
        const int slot = i & 1, tile = piece.begin_tile + i;
        if (lane == 0) {
          storage.tiles_issued = ++issued;
        }
        TmaCoordinates at{0, 0, 0, place.kv_head, 0};
        const bool load = by_tma(params, piece, tile);
        if (load && lane < boxes) {
          const int key = tile * C::kKeys + lane * params.box_rows;
          at.page = table[key / params.page];
          at.row = key % params.page;
        }
        const uint32_t destination = shared_address(storage.k[slot]) + lane * params.box_rows * kSliceRowBytes;
#pragma unroll 1
        for (int order = 0; order < kNumGroups; ++order) {
          const int group = C::load_order(slot, order), slices = C::num_slices(group);
          if (slices == 0) {
            continue;
          }
          // Also where the row warps load the tile: a wait that is left out would make the next one pass a phase too early.
          mbarrier_wait(shared_address(&storage.k_empty[slot][group]), phases.parity(slot) ^ 1);
          if (load) {
            const uint32_t full = shared_address(&storage.k_full[slot][group]);
            if (lane == 0) {
              mbarrier_arrive(full);
              mbarrier_arrive_expect_bytes(full, slices * C::kSliceBytes);
            }
            __syncwarp();
            if (lane < boxes) {
              for (int s = 0; s < slices; ++s) {
                at.slice = C::first_slice(group) + s;
                tma_load(destination + at.slice * C::kSliceBytes, &map, at, full);
              }
            }
          }
        }
        phases.advance(slot);
      }
    }
  }
};

template <class C>
struct PrefetchWarp {
  static __device__ void run(const DenseDecodeParams& params, const CUtensorMap& map, Storage<C>& storage, const Place& place, int lane) {
    if (params.box_rows == 0 || params.prefetch_tiles == 0) {
      return;
    }
    const int boxes = C::kKeys / params.box_rows;
    Pieces pieces(params, place.part, place.causal_cut);
    int count = 0;
    for (Piece piece; pieces.next(piece);) {
      const int32_t* table = params.block_table + piece.request * params.stride_table_b;
      for (int i = 0; i < piece.num_tiles; ++i, ++count) {
        const int tile = piece.begin_tile + i;
        while (storage.tiles_issued + params.prefetch_tiles < count) {
          __nanosleep(100);
        }
        if (count < storage.tiles_issued || !by_tma(params, piece, tile)) {
          continue;
        }
        if (params.prefetch_mode == 4) {
          const int share = params.prefetch_shared ? params.prefetch_shared : 1, mine = place.row_tile % share;
          constexpr int kLines = C::kHeadDimQK * 2 / 128;
          for (int row = lane / 8; row < C::kKeys; row += 4) {
            if (row / 4 % share != mine) continue;
            const int key = tile * C::kKeys + row;
            const char* source = static_cast<const char*>(params.k_cache) +
                                 2 * (table[key / params.page] * params.stride_k_page + key % params.page * params.stride_k_row + place.kv_head * params.stride_k_h);
            for (int line = lane % 8; line < kLines; line += 8) {
              asm volatile("prefetch.global.L2 [%0];" ::"l"(source + line * 128));
            }
          }
          continue;
        }
        if (params.prefetch_shared && count % params.prefetch_shared != place.row_tile % params.prefetch_shared) {
          continue;
        }
        if (params.prefetch_mode == 1) {
          if (lane < boxes) {
            const int key = tile * C::kKeys + lane * params.box_rows;
            TmaCoordinates at{0, key % params.page, 0, place.kv_head, table[key / params.page]};
            for (int s = 0; s < C::kSlices; ++s) {
              at.slice = s;
              tma_prefetch_l2(&map, at);
            }
          }
        } else if (params.prefetch_mode == 2) {
          for (int row = lane; row < C::kKeys; row += 32) {
            const int key = tile * C::kKeys + row;
            const char* source = static_cast<const char*>(params.k_cache) +
                                 2 * (table[key / params.page] * params.stride_k_page + key % params.page * params.stride_k_row + place.kv_head * params.stride_k_h);
            bulk_prefetch_l2(source, C::kHeadDimQK * 2);
          }
        } else {
          for (int row = lane; row < boxes; row += 32) {
            const int key = tile * C::kKeys + row * params.box_rows;
            const char* source = static_cast<const char*>(params.k_cache) +
                                 2 * (table[key / params.page] * params.stride_k_page + key % params.page * params.stride_k_row + place.kv_head * params.stride_k_h);
            bulk_prefetch_l2(source, params.box_rows * params.stride_k_row * 2);
          }
        }
      }
    }
  }
};

template <class C>
struct RowWarps {
  static constexpr int kRowsPerWarp = C::kRows / kNumRowWarps;

  static __device__ void run(const DenseDecodeParams& params, Storage<C>& storage, const Place& place, int warp, int lane) {
    Pieces pieces(params, place.part, place.causal_cut);
    SlotPhases phases;
    uint32_t q_parity = 1;
    int count = 0;
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
        ++count;
        if (!by_tma(params, piece, tile)) {
          // The tiles before this one were not this warp's: parities mean something once the TMA warp has come here.
          while (params.box_rows > 0 && storage.tiles_issued < count) {
            __nanosleep(20);
          }
          load_keys(params, storage, place, table, piece.seqlen, tile, slot, phases.parity(slot) ^ 1, first_row, lane);
        }
        phases.advance(slot);
      }
    }
    async_copy_wait<0>();
  }

 private:
  // This warp's rows of a group of slices: 8 lanes a row, 16 bytes each. `source` and `valid` are those of row first_row + lane.
  static __device__ __forceinline__ void copy_slices(uint32_t tile, int first_slice, int num_slices, int first_row, int lane, const char* source, bool valid) {
    const int unit = lane % 8;
#pragma unroll
    for (int i = 0; i < kRowsPerWarp / 4; ++i) {
      const int from = 4 * i + lane / 8, row = first_row + from;
      const auto row_source = reinterpret_cast<const char*>(__shfl_sync(~0u, reinterpret_cast<uintptr_t>(source), from));
      const bool row_valid = __shfl_sync(~0u, valid, from);
      const uint32_t destination = tile + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16);
      for (int s = first_slice; s < first_slice + num_slices; ++s) {
        async_copy16(destination + s * C::kSliceBytes, row_source + s * kSliceRowBytes + unit * 16, row_valid);
      }
    }
    async_copy_commit();
  }

  // The copies made so far are there for wgmma once every warp has arrived.
  static __device__ __forceinline__ void hand_over(uint64_t* barrier, int lane) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(shared_address(barrier));
    }
  }

  static __device__ void load_q(const DenseDecodeParams& params, Storage<C>& storage, const Place& place, int request, int first_row, int lane, uint32_t parity) {
    const int row = place.row_tile * C::kRows + first_row + lane;
    const bool valid = row < params.s_q * params.group;
    const int token = row / params.group, head = place.kv_head * params.group + row % params.group;
    const char* source = static_cast<const char*>(params.q);
    if (valid) {
      source += sizeof(typename C::Element) * (request * params.stride_q_b + token * params.stride_q_s + head * params.stride_q_h);
    }
    mbarrier_wait(shared_address(&storage.q_empty), parity);
    copy_slices(shared_address(storage.q), 0, C::kSlices, first_row, lane, source, valid);
    async_copy_wait<0>();
    hand_over(&storage.q_full, lane);
  }

  static __device__ void load_keys(const DenseDecodeParams& params, Storage<C>& storage, const Place& place, const int32_t* table, int seqlen, int tile, int slot, uint32_t parity,
                                   int first_row, int lane) {
    const int key = tile * C::kKeys + first_row + lane;
    const char* source = static_cast<const char*>(params.k_cache);
    bool valid = key < seqlen;
    if (valid) {
      const int page = table[key / params.page];
      valid = page >= 0 && page < params.num_pages;
      if (valid) {
        source += sizeof(typename C::Element) * (page * params.stride_k_page + key % params.page * params.stride_k_row + place.kv_head * params.stride_k_h);
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
        hand_over(&storage.k_full[slot][group], lane);
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
