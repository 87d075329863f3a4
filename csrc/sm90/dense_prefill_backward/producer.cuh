// The warps that move data: one thread issues all TMA loads, one warp hands out items, one cleans rows beyond a
// sequence's end, one thread adds gradients of Q to those in global memory.
#pragma once

#include "device/sm90/copy.cuh"
#include "sm90/dense_prefill_backward/storage.h"
#include "sm90/items.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

// Calls f(item) for one thread. Items stay where they lie: these warps have few registers.
template <class Storage, class F>
__device__ __forceinline__ void for_items(Storage& storage, F&& f) {
  ItemReader items(storage);
#pragma unroll 1
  while (true) {
    const Item& item = items.borrow();
    if (!item.exists()) {
      return;
    }
    f(item);
    items.give_back(true);
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

template <class C>
class TmaThread {
 public:
  __device__ __forceinline__ TmaThread(const DensePrefillBackwardParams& params, const TensorMaps& maps,
                                       Storage<C>& storage)
      : params_(params), maps_(maps), storage_(storage) {}

  __device__ __forceinline__ void run() {
    for_items(storage_, [&](const Item& item) {
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
    const uint32_t full =
        shared_address(item.num_keys < C::kKeys ? &storage_.keys_landed : &storage_.keys_full);
    mbarrier_arrive_expect_bytes(full, C::kKBytes + C::kVBytes);
#pragma unroll
    for (int slice = 0; slice < C::kSlices; ++slice) {
      tma_load(shared_address(storage_.k + C::slice_position(slice) * C::kKeySliceBytes), &maps_.k,
               {0, item.first_key, slice, item.kv_head, 0}, full);
    }
    tma_load(shared_address(storage_.v), &maps_.v, {0, item.first_key, 0, item.kv_head, 0}, full);
  }

  __device__ __forceinline__ void load_rows(const Item& item, int head, int tile) {
    // A stage is released in the step behind its own, and in the first step there is the last stage, which was not used.
    const bool last_stage = rows_.stage == C::kStages - 1;
    mbarrier_wait(shared_address(&storage_.rows_empty[rows_.stage]), rows_.parity ^ (last_stage ? 0 : 1));
    const bool to_clean = (tile + 1) * C::kQueries > item.num_queries;
    const uint32_t full =
        shared_address(to_clean ? &storage_.rows_landed[rows_.stage] : &storage_.rows_full[rows_.stage]);
    const int token = item.first_query + tile * C::kQueries;
    mbarrier_arrive_expect_bytes(full, C::kQBytes + C::kOutBytes + C::kRowTermBytes);
    tma_load(shared_address(storage_.q[rows_.stage]), &maps_.q, {0, token, 0, head, 0}, full);
    tma_load(shared_address(storage_.row_terms[rows_.stage]), &maps_.row_terms, {token, 0, head, 0, 0}, full);
    tma_load(shared_address(storage_.d_out[rows_.stage]), &maps_.d_out, {0, token, 0, head, 0}, full);
    rows_.advance();
  }

  const DensePrefillBackwardParams& params_;
  const TensorMaps& maps_;
  Storage<C>& storage_;
  Ring<C::kStages> rows_;
  uint32_t keys_parity_ = 0;
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

// Behind a sequence's last row come those of another one, or none at all. What is computed of them is 0 or not stored,
// but 0 times what is no number is none: they become zeros before any product reads them, and their row terms those of
// a row without keys.
template <class C>
class Cleaner {
 public:
  static __device__ __forceinline__ void run(Storage<C>& storage, int group, int lane) {
    ItemReader items(storage);
    uint32_t tiles = 0;  // before this item, in the order of use
    uint32_t keys_parity = 0, rows_parities = 0;
    for (Item item; items.next(item, lane);) {
      const int num_tiles = item.end_tile() - item.first_tile;
      if (num_tiles == 0) {
        continue;
      }
      if (item.num_keys < C::kKeys) {
        mbarrier_wait(shared_address(&storage.keys_landed), keys_parity);
        keys_parity ^= 1;
        clean<C::kSlices, C::kKeySliceBytes>(storage.k, item.num_keys, lane);
        clean<C::kValueSlices, C::kKeySliceBytes>(storage.v, item.num_keys, lane);
        hand_over(&storage.keys_full, lane);
      }
      const int end = item.num_queries % C::kQueries;
#pragma unroll 1
      for (int head = 0; head < group; ++head) {
        tiles += num_tiles;
        if (end > 0) {
          const int stage = (tiles - 1) % C::kStages;
          mbarrier_wait(shared_address(&storage.rows_landed[stage]), rows_parities >> stage & 1);
          rows_parities ^= 1u << stage;
          clean<C::kSlices, C::kQuerySliceBytes>(storage.q[stage], end, lane);
          clean<C::kValueSlices, C::kQuerySliceBytes>(storage.d_out[stage], end, lane);
#pragma unroll 1
          for (int row = end + lane; row < C::kQueries; row += 32) {
            storage.row_terms[stage][0][row] = INFINITY;
            storage.row_terms[stage][1][row] = 0;
          }
          hand_over(&storage.rows_full[stage], lane);
        }
      }
    }
  }

 private:
  template <int kSlices, int kSliceBytes>
  static __device__ __forceinline__ void clean(unsigned char* slices, int end, int lane) {
#pragma unroll 1
    for (int slice = 0; slice < kSlices; ++slice) {
      auto* rows = reinterpret_cast<uint4*>(slices + slice * kSliceBytes);
#pragma unroll 1
      for (int unit = end * (kSliceRowBytes / 16) + lane; unit < kSliceBytes / 16; unit += 32) {
        rows[unit] = make_uint4(0, 0, 0, 0);
      }
    }
  }

  static __device__ __forceinline__ void hand_over(uint64_t* full, int lane) {
    fence_async_proxy();
    __syncwarp();
    if (lane == 0) {
      mbarrier_arrive(shared_address(full));
    }
  }
};

// One thread. Sums of float32 depend on their order: where it matters, tiles of keys take turns.
template <class C>
class Adder {
 public:
  static __device__ __forceinline__ void run(const DensePrefillBackwardParams& params, const TensorMaps& maps,
                                             Storage<C>& storage) {
    uint32_t parity = 0;
    for_items(storage, [&](const Item& item) {
      for_tiles(item, params.forward.group, [&](int head, int tile) {
        const int token = item.first_query + tile * C::kQueries;
        int32_t* turn = nullptr;
        if (params.turns != nullptr) {
          turn = params.turns + static_cast<int64_t>(head) * params.forward.tokens_q + token;
          wait_for(turn, turn_of(item, tile, params.forward.causal));
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
          pass_on(turn);
        }
      });
    });
    bulk_wait<0>();
  }

 private:
  // How many tiles of keys add before this one: those behind it in a causal call, since they have been handed out
  // before, else those in front of it.
  static __device__ __forceinline__ int turn_of(const Item& item, int tile, bool causal) {
    if (!causal) {
      return item.key_tile;
    }
    const int last_query = min((tile + 1) * C::kQueries, item.num_queries) - 1;
    return (last_query + item.limit - 1) / C::kKeys;
  }

  static __device__ __forceinline__ void wait_for(const int32_t* turn, int wanted) {
    int value;
    do {
      asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(turn) : "memory");
    } while (value != wanted);
    asm volatile("fence.proxy.async.global;" ::: "memory");
  }

  static __device__ __forceinline__ void pass_on(int32_t* turn) {
    asm volatile("fence.proxy.async.global;" ::: "memory");
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(turn) : "memory");
  }
};

}  // namespace flash_mla::sm90::dense_prefill_backward
