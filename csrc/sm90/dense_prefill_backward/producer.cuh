// What moves data: a thread that issues all TMA loads, one that hands out items, one that adds gradients of Q to those
// in global memory, and a warp for row terms and for rows beyond a sequence's end.
#pragma once

#include "device/copy.cuh"
#include "device/numeric.cuh"
#include "device/turns.cuh"
#include "sm90/dense_prefill_backward/storage.h"
#include "sm90/items.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

// Calls f(item) for a warp, or for a thread on its own as lane 0. Items stay where they lie: these warps have few
// registers.
template <class Storage, class F>
__device__ __forceinline__ void for_items(Storage& storage, int lane, F&& f) {
  ItemReader items(storage);
#pragma unroll 1
  while (true) {
    const Item& item = items.borrow();
    if (!item.exists()) {
      return;
    }
    f(item);
    items.give_back(lane == 0);
  }
}

// Calls f(query head, tile) for what an item meets, in order.
template <class F>
__device__ __forceinline__ void for_tiles(const Item& item, int group, F&& f) {
#pragma unroll 1
  for (int head = item.kv_head * group, left = group; left > 0; --left, ++head) {
#pragma unroll 1
    for (int tile = item.first_tile; tile < item.end_tile(); ++tile) {
      f(head, tile);
    }
  }
}

// The math warps release a stage in the step behind its own, and in the first step the last stage, which was not used.
template <class C>
__device__ __forceinline__ void wait_for_empty_rows(Storage<C>& storage, uint32_t step) {
  const uint32_t stage = step % C::kStages, round = step / C::kStages;
  mbarrier_wait(shared_address(&storage.rows_empty[stage]), (round & 1) ^ (stage != C::kStages - 1));
}

template <class C>
class TmaThread {
 public:
  __device__ __forceinline__ TmaThread(const DensePrefillBackwardParams& params, const TensorMaps& maps,
                                       Storage<C>& storage)
      : params_(params), maps_(maps), storage_(storage) {}

  __device__ __forceinline__ void run() {
    for_items(storage_, 0, [&](const Item& item) {
      bool first = true;
      for_tiles(item, params_.forward.group, [&](int head, int tile) {
        load_rows(item, head, tile);
        if (first) {
          load_keys(item);
          first = false;
        }
      });
      if (first) {
        pass_keys();
      }
      mbarrier_arrive(shared_address(&storage_.item_wanted));
    });
  }

 private:
  // Of an item that meets nothing.
  __device__ __forceinline__ void pass_keys() {
    mbarrier_wait(shared_address(&storage_.keys_empty), keys_parity_ ^ 1);
    keys_parity_ ^= 1;
    mbarrier_arrive(shared_address(&storage_.keys_full));
  }

  __device__ __forceinline__ void load_keys(const Item& item) {
    mbarrier_wait(shared_address(&storage_.keys_empty), keys_parity_ ^ 1);
    keys_parity_ ^= 1;
    const uint32_t full = shared_address(item.num_keys < C::kKeys ? &storage_.keys_landed : &storage_.keys_full);
    mbarrier_arrive_expect_bytes(full, C::kKBytes + C::kVBytes);
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) {
      tma_load(shared_address(storage_.k + C::slice_position(slice) * C::kKeySliceBytes), &maps_.k,
               {0, item.first_key, slice, item.kv_head, 0}, full);
    }
    tma_load(shared_address(storage_.v), &maps_.v, {0, item.first_key, 0, item.kv_head, 0}, full);
  }

  __device__ __forceinline__ void load_rows(const Item& item, int head, int tile) {
    const int stage = step_ % C::kStages;
    wait_for_empty_rows(storage_, step_);
    ++step_;
    const bool to_clean = (tile + 1) * C::kQueries > item.num_queries;
    const uint32_t full = shared_address(to_clean ? &storage_.rows_landed[stage] : &storage_.rows_full[stage]);
    const int token = item.first_query + tile * C::kQueries;
    mbarrier_arrive_expect_bytes(full, C::kQBytes + C::kOutBytes);
    tma_load(shared_address(storage_.q[stage]), &maps_.q, {0, token, 0, head, 0}, full);
    tma_load(shared_address(storage_.d_out[stage]), &maps_.d_out, {0, token, 0, head, 0}, full);
  }

  const DensePrefillBackwardParams& params_;
  const TensorMaps& maps_;
  Storage<C>& storage_;
  uint32_t step_ = 0, keys_parity_ = 0;
};

// One thread. Items differ in length, so which one a CTA takes next is decided when it needs one.
template <class C>
__device__ __forceinline__ void schedule(const DensePrefillBackwardParams& params, Storage<C>& storage) {
  const int num_items = params.forward.plan->num_items;
  Ring<2> slot;
  uint32_t wanted_parity = 0;
  while (true) {
    const int number = atomicAdd(&params.forward.plan->num_taken, 1);
    mbarrier_wait(shared_address(&storage.item_empty[slot.stage]), slot.parity ^ 1);
    if (number < num_items) {
      static_cast<BackwardItem&>(storage.items[slot.stage]) = params.items[number];
    } else {
      storage.items[slot.stage].num_keys = 0;
    }
    mbarrier_arrive(shared_address(&storage.item_full[slot.stage]));
    if (number >= num_items) {
      return;
    }
    slot.advance();
    mbarrier_wait(shared_address(&storage.item_wanted), wanted_parity);
    wanted_parity ^= 1;
  }
}

// One warp. It loads the row terms, which TMA cannot: it wants starts that are multiples of 16 bytes. And it cleans:
// behind a sequence's last row come those of another one, or none at all. What is computed of them is 0 or not stored,
// but 0 times what is no number is none, so they become zeros before any product reads them.
template <class C>
class RowWarp {
 public:
  __device__ __forceinline__ RowWarp(const DensePrefillBackwardParams& params, Storage<C>& storage, int lane)
      : params_(params), storage_(storage), lane_(lane) {}

  __device__ __forceinline__ void run() {
    for_items(storage_, lane_, [&](const Item& item) {
      if (item.num_queries > 0 && item.num_keys < C::kKeys) {
        wait_for_landing(storage_.keys_landed, C::kStages);
        clean<C::kSlices, C::kKeySliceBytes>(storage_.k, item.num_keys);
        clean<C::kValueSlices, C::kKeySliceBytes>(storage_.v, item.num_keys);
        fence_async_proxy();
        __syncwarp();
        mbarrier_arrive_if(shared_address(&storage_.keys_full), lane_ == 0);
      }
      for_tiles(item, params_.forward.group, [&](int head, int tile) { load(item, head, tile); });
      __syncwarp();
    });
  }

 private:
  __device__ __forceinline__ void load(const Item& item, int head, int tile) {
    const int num_rows = item.num_queries - tile * C::kQueries, stage = step_ % C::kStages;
    const int64_t first = static_cast<int64_t>(head) * params_.forward.tokens_q + item.first_query + tile * C::kQueries;
    wait_for_empty_rows(storage_, step_);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = lane_ + 32 * i;
      // Rows that there are not have probabilities of 0.
      storage_.log_sums[stage][row] = row < num_rows ? params_.forward.lse[first + row] * kLog2E : INFINITY;
      storage_.deltas[stage][row] = row < num_rows ? params_.deltas[first + row] : 0;
    }
    const bool to_clean = num_rows < C::kQueries;
    if (to_clean) {
      wait_for_landing(storage_.rows_landed[stage], stage);
      clean<C::kSlices, C::kQuerySliceBytes>(storage_.q[stage], num_rows);
      clean<C::kValueSlices, C::kQuerySliceBytes>(storage_.d_out[stage], num_rows);
      fence_async_proxy();
    }
    // Each lane for what it has stored, one of them in place of TMA as well.
    mbarrier_arrive_if(shared_address(&storage_.rows_full[stage]), to_clean && lane_ == 0);
    mbarrier_arrive(shared_address(&storage_.rows_full[stage]));
    ++step_;
  }

  // `slot`: of the parities.
  __device__ __forceinline__ void wait_for_landing(uint64_t& landed, int slot) {
    mbarrier_wait(shared_address(&landed), parities_ >> slot & 1);
    parities_ ^= 1u << slot;
  }

  template <int kSlices, int kSliceBytes>
  __device__ __forceinline__ void clean(unsigned char* slices, int end) {
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      auto* rows = reinterpret_cast<uint4*>(slices + slice * kSliceBytes);
#pragma unroll 1
      for (int unit = end * (kSliceRowBytes / 16) + lane_; unit < kSliceBytes / 16; unit += 32) {
        rows[unit] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  const DensePrefillBackwardParams& params_;
  Storage<C>& storage_;
  const int lane_;
  uint32_t step_ = 0, parities_ = 0;
};

// One thread. Sums of float32 depend on their order: where it matters, tiles of keys take turns.
template <class C>
class Adder {
 public:
  static __device__ __forceinline__ void run(const DensePrefillBackwardParams& params, const TensorMaps& maps,
                                             Storage<C>& storage) {
    uint32_t parity = 0;
    for_items(storage, 0, [&](const Item& item) {
      for_tiles(item, params.forward.group, [&](int head, int tile) {
        const int token = item.first_query + tile * C::kQueries;
        int32_t* turn = nullptr;
        if (params.turns != nullptr) {
          turn = params.turns + static_cast<int64_t>(head) * params.forward.tokens_q + token;
          wait_for_turn(turn, turn_of(item, tile, params.forward.causal));
        }
#pragma unroll
        for (int w = 0; w < C::kWarpgroups; ++w) {
          mbarrier_wait(shared_address(&storage.dq_full[w]), parity);
          tma_add(&maps.dq_sum, {0, token, w * C::kDqSlices, head, 0}, shared_address(storage.dq[w]));
          bulk_commit();
        }
        parity ^= 1;
        bulk_wait_read<1>();
        mbarrier_arrive(shared_address(&storage.dq_empty[0]));
        bulk_wait_read<0>();
        mbarrier_arrive(shared_address(&storage.dq_empty[1]));
        if (turn != nullptr) {
          bulk_wait<0>();
          pass_turn_on(turn);
        }
      });
    });
    bulk_wait<0>();
  }
};

}  // namespace flash_mla::sm90::dense_prefill_backward
