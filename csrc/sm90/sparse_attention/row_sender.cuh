// Brings the rows of the next tiles: the four warps of math warpgroup 1 do so while they wait for probabilities. Each
// has sixteen keys of a tile, for two converting warps, and sends for a half of their rows by asynchronous copies as
// soon as these have read the one before it.
#pragma once

#include "device/sparse/formats.cuh"
#include "device/sparse/key_lists.cuh"
#include "sm90/sparse_attention/storage.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class RowSender : KeyLists<SenderConfig<C>, Storage<C>> {
  using Base = KeyLists<SenderConfig<C>, Storage<C>>;
  using Base::ahead_, Base::index_, Base::lane_, Base::next_row_in_page_, Base::params_, Base::storage_, Base::walk_,
      Base::warp_, Base::kLanes, Base::kWarpKeys;

 public:
  __device__ __forceinline__ RowSender(const SparseAttentionParams& params, Storage<C>& storage)
      : Base(params, storage, storage.walks[threadIdx.x / 32 % 4], __shfl_sync(~0u, threadIdx.x / 32 % 4, 0),
             static_cast<int>(threadIdx.x % 32), typename Base::IsTold()) {}

  // Waits for the kernels before this one.
  __device__ __forceinline__ void begin() {
    this->begin_lists();
    this->wait_if_early();
    this->fetch_indices();
    leave({ahead_.bits, 0, 0});
  }

  // Sends for the next tile, whose indices have been fetched, and fetches those of the tile behind it. A piece without
  // tiles, and the end, are told as well; nothing behind the end.
  __device__ __forceinline__ void send() {
    Sent sent = storage_.sent[warp_];
    const Entry entry{sent.entry};
    if (sent.told > 0 && !entry.exists()) {
      return;
    }
    const uint32_t slot = sent.told % 2;
    if (entry.has_tile()) {
      // Converting warps can ask for Q before the rows are known.
      tell(entry, slot);
    }
    index_ = storage_.indices[warp_][lane_ / kLanes];
    const uint32_t valid = locate(entry);
    this->fetch_indices();
    mbarrier_wait(shared_address(&storage_.left_empty[warp_]), slot ^ 1);
    if (entry.has_tile()) {
      const uint32_t parity = sent.tiles % 2;
      if (lane_ == 0) {
        storage_.valid[sent.tiles % kValidTurns][warp_] = static_cast<uint16_t>(valid);
      }
      __syncwarp();
      copy_left(entry, storage_.scales[parity][warp_]);
      async_copy_arrive(shared_address(&storage_.left_full[warp_]));
      // Orders what the warp has stored.
      if (lane_ == 0) {
        mbarrier_arrive(shared_address(&storage_.left_full[warp_]));
      }
      mbarrier_wait(shared_address(&storage_.right_empty[warp_]), parity ^ 1);
      copy_right(entry);
      async_copy_arrive(shared_address(&storage_.right_full[warp_]));
      ++sent.tiles;
    } else {
      // Not earlier: these are handed back at once, and two phases that end unseen look like none.
      tell(entry, slot);
    }
    leave({ahead_.bits, sent.told + 1, sent.tiles});
  }

 private:
  __device__ __forceinline__ void tell(const Entry& entry, uint32_t slot) const {
    if (lane_ == 0) {
      storage_.entries[slot][warp_] = entry.bits;
      mbarrier_arrive(shared_address(&storage_.told[slot][warp_]));
    }
  }

  // There are no registers for it.
  __device__ __forceinline__ void leave(const Sent& sent) {
    __syncwarp();
    if (lane_ == 0) {
      storage_.sent[warp_] = sent;
    }
    if (lane_ % kLanes == 0) {
      storage_.indices[warp_][lane_ / kLanes] = index_;
    }
    __syncwarp();
  }

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

  __device__ __forceinline__ void copy_left(const Entry& entry,
                                            unsigned char (&scale_bytes)[C::kSenderKeys][C::kScaleBytes]) const {
    with_format<C>(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const int lane = this->opaque_lane(), key = lane / kLanes, part = lane % kLanes * 16;
      const Strip<2 * kLayout.value_bits> values(storage_.rows[warp_], 0, lane);
      const auto scales = reinterpret_cast<const unsigned char*>(
          (kLayout.scales_behind_page ? storage_.scale_rows : storage_.rows)[warp_][key]);
      values.copy(storage_.left[warp_], 0);
      const uint32_t place = shared_address(scale_bytes[key]);
      if constexpr (kLayout.scales_behind_page) {
        if (part == 0) {
          async_copy8(place, scales);
        }
      } else if constexpr (kLayout.scale != ScaleType::kNone) {
        static_assert(kLayout.scale_bytes() <= kLanes * 16);
        if (part < kLayout.scale_bytes()) {
          async_copy16(place + part, scales + kLayout.value_bytes() + part);
        }
      }
    });
  }

  __device__ __forceinline__ void copy_right(const Entry& entry) const {
    with_format<C>(entry, [&](auto format) {
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
};

}  // namespace flash_mla::sm90::sparse_attention
