// The four warps that bring rows. Each has 16 keys of a tile, for two converting warps, and sends for a half of their
// rows by asynchronous copies as soon as these have read the one before it.
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
  __device__ __forceinline__ RowSender(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, storage.walks[warp], warp, lane), policy_(evict_first_policy()) {}

  // Waits for the kernels before this one.
  __device__ __forceinline__ void run() {
    this->wait_if_early();
    this->fetch_indices();
    Entry entry{0}, begun{0};  // begun: the left half of its rows is sent for, and not the right one
    uint32_t tiles = 0, slot = 0;
#pragma unroll 1
    do {
      if (begun.has_tile()) {
        mbarrier_wait(shared_address(&storage_.right_empty[warp_]), tiles & 1);
        copy_right(begun);
        async_copy_arrive(shared_address(&storage_.right_full[warp_]));
        __syncwarp();
      }
      entry = ahead_;
      if (entry.has_tile()) {
        // Converting warps can ask for Q before the rows are known.
        tell(entry, slot);
      }
      const uint32_t valid = locate(entry);
      this->fetch_indices();
      this->prefetch_next_q();
      mbarrier_wait(shared_address(&storage_.left_empty[warp_]), slot ^ 1);
      if (entry.has_tile()) {
        if (lane_ == 0) {
          storage_.valid[tiles % kValidTurns][warp_] = static_cast<uint16_t>(valid);
        }
        __syncwarp();
        copy_left(entry, storage_.scales[tiles & 1][warp_]);
        async_copy_arrive(shared_address(&storage_.left_full[warp_]));
        // Orders what the warp has stored.
        if (lane_ == 0) {
          mbarrier_arrive(shared_address(&storage_.left_full[warp_]));
        }
        ++tiles;
      } else {
        // Not earlier: these are handed back at once, and two phases that end unseen look like none.
        tell(entry, slot);
      }
      begun = entry;
      slot ^= 1;
    } while (entry.exists());
    async_copy_wait<0>();
  }

 private:
  __device__ __forceinline__ void tell(const Entry& entry, uint32_t slot) const {
    if (lane_ == 0) {
      storage_.entries[slot][warp_] = entry.bits;
      mbarrier_arrive(shared_address(&storage_.told[slot][warp_]));
    }
  }

  // Leaves where the rows of the warp's keys are, and their scales where these are no part of them, for the copies.
  // Which keys count.
  __device__ __forceinline__ uint32_t locate(const Entry& entry) {
    const unsigned char* row = Base::locate(entry);
    if (lane_ % kLanes == 0) {
      storage_.rows[warp_][lane_ / kLanes] = reinterpret_cast<uint64_t>(row);
      with_format<C>(entry, [&](auto format) {
        constexpr KVLayout kLayout = decltype(format)::kLayout;
        if constexpr (kLayout.scales_behind_page) {
          const int page = params_.keys[entry.source()].page, row_in_page = next_row_in_page_;
          const int distance = (page - row_in_page) * kLayout.row_stride() + row_in_page * kLayout.scale_stride();
          storage_.scale_rows[warp_][lane_ / kLanes] =
              reinterpret_cast<uint64_t>(row + (row == kZeroRow ? kLayout.row_stride() : distance));
        }
      });
    }
    return this->valid_keys(row);
  }

  // `kUnits` units of 16 bytes of each of the warp's rows, from `offset` on. A copy is a barrier to the compiler, and
  // loads of addresses between copies would wait for each other: four at a time.
  template <int kUnits, int kStride>
  __device__ __forceinline__ void copy_units(int offset, unsigned char (&to)[kWarpKeys][kStride], int to_offset) const {
    constexpr int kRows = 32 / kUnits, kCopies = kWarpKeys / kRows, kAtOnce = std::min(kCopies, 4);
    const int lane = this->opaque_lane(), first = lane / kUnits, unit = lane % kUnits * 16;
    const uint32_t place = shared_address(to[first]) + to_offset + unit;
#pragma unroll
    for (int i = 0; i < kCopies; i += kAtOnce) {
      const unsigned char* source[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        source[j] =
            reinterpret_cast<const unsigned char*>(storage_.rows[warp_][(i + j) * kRows + first]) + offset + unit;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        async_copy16_hinted(place + (i + j) * kRows * kStride, source[j], policy_);
      }
    }
  }

  __device__ __forceinline__ void copy_left(const Entry& entry,
                                            unsigned char (&scale_bytes)[C::kSenderKeys][C::kScaleBytes]) const {
    with_format<C>(entry, [&](auto format) {
      constexpr KVLayout kLayout = decltype(format)::kLayout;
      const int key = lane_ / kLanes, part = lane_ % kLanes * 16;
      copy_units<2 * kLayout.value_bits>(0, storage_.left[warp_], 0);
      const auto scales = reinterpret_cast<const unsigned char*>(
          (kLayout.scales_behind_page ? storage_.scale_rows : storage_.rows)[warp_][key]);
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
      auto& right = storage_.right[warp_];
      copy_units<2 * kLayout.value_bits>(32 * kLayout.value_bits, right, 0);
      if constexpr (C::kHasRope) {
        constexpr int kBehind = C::kRopeInValues ? 512 : layout_of(C::kFormat).rope_offset();
        copy_units<C::kRopeBehindValues && !C::kRopeQuantised ? 8 : 4>(kBehind, right, C::kLeftBytes);
      }
    });
  }

  // Each row is read once a call: Q, results and partial results are to stay in L2 instead.
  const uint64_t policy_;
};

}  // namespace flash_mla::sm90::sparse_attention
