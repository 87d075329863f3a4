// What a CTA asks L2 for before it knows that the kernels before this one have ended: its first rows of Q and its first
// keys come from memory while those still run.
//
// The schedule may not have been written yet, so what is read of it here, and of the block table, says only what to ask
// for. Nothing of it is kept, what is read passes by the L1 cache, and all addresses lie within their tensors.
#pragma once

#include "core/params/dense_decode.h"
#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "sm90/dense_decode/config.h"
#include "sm90/dense_decode/pieces.cuh"
#include "sm90/dense_decode/storage.h"

namespace flash_mla::sm90::dense_decode {

__device__ __forceinline__ int load_hint(const int32_t* address) {
  int value;
  asm volatile("ld.global.cg.s32 %0, [%1];" : "=r"(value) : "l"(address));
  return value;
}

// Where a part's first piece begins, as far as one can tell. The loads are under way when `find_hint` returns.
struct Hint {
  int request = -1, block = -1;  // -1: unknown
};

__device__ __forceinline__ Hint find_hint(const DenseDecodeParams& params, int part) {
  if (params.schedule == nullptr) {
    return {params.first_request + part / params.max_cuts, part % params.max_cuts == 0 ? 0 : -1};
  }
  return {load_hint(&params.schedule[part].begin_request), load_hint(&params.schedule[part].begin_block)};
}

// Rows of Q from `first_row` of the tile on, by one warp.
template <class C>
__device__ __forceinline__ void prefetch_q(const DenseDecodeParams& params, const Place& place, int request,
                                           int first_row, int num_rows, int lane) {
  constexpr int kLineBytes = 128, kRowLines = C::kSlices;
  first_row += place.row_tile * C::kRows;
  const int rows = min(params.s_q * params.group - first_row, num_rows);
#pragma unroll 1
  for (int i = lane; i < rows * kRowLines; i += 32) {
    const int row = first_row + i / kRowLines, token = row / params.group,
              head = place.kv_head * params.group + row - token * params.group;
    prefetch_l2(static_cast<const char*>(params.q) +
                sizeof(typename C::Element) *
                    (request * params.stride_q_b + token * params.stride_q_s + head * params.stride_q_h) +
                i % kRowLines * kLineBytes);
  }
}

// The length, and the tiles that fill the slots first; by one thread.
template <class C>
__device__ __forceinline__ void prefetch_keys(const DenseDecodeParams& params, const CacheMaps& maps,
                                              const Place& place, const Hint& hint) {
  constexpr int kTiles = 2;
  prefetch_l2(params.cache_seqlens + hint.request);
  if (params.box_rows != C::kKeys || hint.block < 0) {
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kTiles; ++i) {
    const int64_t key = (static_cast<int64_t>(hint.block) + i) * C::kKeys,
                  index = params.page_shift >= 0 ? key >> params.page_shift : key / params.page;
    if (index >= params.max_pages) {
      return;
    }
    const int page = load_hint(params.block_table + hint.request * params.stride_table_b + index);
    if (page < 0 || page >= params.num_pages) {
      return;
    }
    const int row = static_cast<int>(key - index * params.page);
#pragma unroll 1
    for (int slice = 0; slice < C::kSlices; slice += 2) {
      tma_prefetch(slice < 8 ? &maps.two_slices : &maps.one_slice, {0, row, slice, place.kv_head, page});
    }
  }
}

// The barrier at which all warps meet, and around it the hints, by warps that are not needed first. Calls of several
// row tiles, whose CTAs share their keys, are bound by products and not by memory.
template <class C>
__device__ __forceinline__ void meet_and_ask_ahead(const DenseDecodeParams& params, const CacheMaps& maps) {
  const int warp = static_cast<int>(threadIdx.x / 32) - C::kMathThreads / 32;
  if (warp < kFirstRowWarp || params.num_row_tiles > 1) {
    __syncthreads();
    return;
  }
  const Place place(params);
  const Hint hint = find_hint(params, place.part);
  __syncthreads();
  if (hint.request < 0 || hint.request >= params.b) {
    return;
  }
  constexpr int kRows = C::kRows / kNumRowWarps;
  if (warp < kFirstRowWarp + kNumRowWarps) {
    prefetch_q<C>(params, place, hint.request, (warp - kFirstRowWarp) * kRows, kRows, threadIdx.x % 32);
  } else if (elect_one()) {
    prefetch_keys<C>(params, maps, place, hint);
  }
}

}  // namespace flash_mla::sm90::dense_decode
