// The four producer warps. Each copies sixteen keys of a tile, group of slices after group; indices are fetched a tile
// ahead. One thread loads Q and the output's gradient by TMA.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "sm90/sparse_prefill_backward/items.cuh"
#include "sm90/sparse_prefill_backward/storage.h"

namespace flash_mla::sm90::sparse_prefill_backward {

template <class C>
class ProducerWarp {
 public:
  __device__ __forceinline__ ProducerWarp(const SparsePrefillBackwardParams& params, const TensorMaps& maps,
                                          Storage<C>& storage, int warp, int lane)
      : params_(params), maps_(maps), storage_(storage), warp_(warp), lane_(lane) {}

  __device__ __forceinline__ void run() {
    for_items<C>(params_, [&](const Item& item) {
      if (item.length == 0) {
        return;
      }
      const int32_t* list = params_.keys.indices + item.token * params_.keys.stride_indices_s;
      int index = load_index(list, item.length, 0);
#pragma unroll 1
      for (int first = 0; first < item.length; first += C::kKeys) {
        const int current = index;
        index = load_index(list, item.length, first + C::kKeys);
        copy_tile(current);
        if (first == 0 && warp_ == 0) {
          load_rows(item);
        }
      }
      ++num_items_;
    });
    async_copy_wait<0>();
  }

 private:
  // Of the lane's key of a tile; lanes 16 to 31 know the same as 0 to 15.
  __device__ __forceinline__ int load_index(const int32_t* list, int length, int first) const {
    const int position = first + warp_ * C::kWarpKeys + lane_ % C::kWarpKeys;
    return position < length ? __ldg(list + position) : -1;
  }

  // Where an index's row lies behind the first one, in bytes; -1 where it names none.
  __device__ __forceinline__ int64_t offset_of(int index) const {
    const KeySource& keys = params_.keys;
    const int page = keys.page_shift >= 0
                         ? index >> keys.page_shift
                         : static_cast<int>(static_cast<unsigned>(index) / static_cast<unsigned>(keys.page));
    return static_cast<uint32_t>(index) < keys.num_slots
               ? page * keys.stride_page + (index - page * keys.page) * keys.stride_row
               : -1;
  }

  __device__ __forceinline__ void copy_tile(int index) {
    const int64_t offset = offset_of(index);
    const bool counts = offset >= 0;
    constexpr int kCopies = C::kWarpKeys / 4;  // of a slice: eight lanes have a key
    const int unit = lane_ % 8;
    const unsigned char* sources[kCopies];
    bool valid[kCopies];
#pragma unroll
    for (int i = 0; i < kCopies; ++i) {
      const int64_t at = __shfl_sync(~0u, offset, 4 * i + lane_ / 8);
      valid[i] = at >= 0;
      sources[i] = static_cast<const unsigned char*>(params_.keys.cache) + (valid[i] ? at : 0) + unit * 16;
    }
    const uint32_t votes = __ballot_sync(~0u, counts);
    const uint32_t parity = num_tiles_ & 1;
    const uint32_t first_row =
        shared_address(storage_.k) + (warp_ * C::kWarpKeys + lane_ / 8) * kSliceRowBytes + ((unit ^ lane_ / 8) * 16);
#pragma unroll
    for (int group = 0; group < C::kWarpgroups; ++group) {
      const uint32_t full = shared_address(&storage_.k_full[group]);
      mbarrier_wait(shared_address(&storage_.k_empty[group]), parity ^ 1);
      if (group == 0) {
        if (lane_ < C::kWarpKeys) {
          storage_.slots[parity][warp_ * C::kWarpKeys + lane_] = counts ? index : -1;
        }
        if (lane_ == 0) {
          storage_.valid[parity][warp_] = static_cast<uint16_t>(votes);
        }
        __syncwarp();
        mbarrier_arrive_if(full, lane_ == 0);
      }
#pragma unroll
      for (int s = 0; s < C::num_slices(group); ++s) {
        const int slice = C::first_slice(group) + s;
#pragma unroll
        for (int i = 0; i < kCopies; ++i) {
          async_copy16((first_row ^ (i % 2 * 64)) + slice * C::kSliceBytes + 4 * i * kSliceRowBytes,
                       sources[i] + slice * kSliceRowBytes, valid[i]);
        }
      }
      async_copy_arrive(full);
    }
    ++num_tiles_;
  }

  __device__ __forceinline__ void load_rows(const Item& item) const {
    mbarrier_wait(shared_address(&storage_.q_empty), (num_items_ & 1) ^ 1);
    if (lane_ == 0) {
      const uint32_t full = shared_address(&storage_.q_full);
      mbarrier_arrive_expect_bytes(full, sizeof(storage_.q) + sizeof(storage_.d_out));
      tma_load(shared_address(storage_.q), &maps_.q, {0, item.first_head, 0, item.token, 0}, full);
      tma_load(shared_address(storage_.d_out), &maps_.d_out, {0, item.first_head, 0, item.token, 0}, full);
    }
    __syncwarp();
  }

  const SparsePrefillBackwardParams& params_;
  const TensorMaps& maps_;
  Storage<C>& storage_;
  const int warp_, lane_;
  uint32_t num_tiles_ = 0, num_items_ = 0;
};

}  // namespace flash_mla::sm90::sparse_prefill_backward
