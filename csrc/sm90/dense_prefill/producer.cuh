// What fills shared memory: one thread issues all TMA loads, and one warp cleans values beyond a sequence's end.
#pragma once

#include "device/copy.cuh"
#include "sm90/dense_prefill/items.cuh"

namespace flash_mla::sm90::dense_prefill {

// Key tiles are taken from the last one down: only the first ones then need masks.
template <class C>
class TmaThread {
 public:
  __device__ __forceinline__ TmaThread(const DensePrefillParams& params, const TensorMaps& maps, Storage<C>& storage)
      : params_(params), maps_(maps), storage_(storage) {}

  __device__ __forceinline__ void run() {
    ItemReader items(storage_);
    for (Item item; items.next(item);) {
      const int kv_head = item.head / params_.group;
      if (item.num_tiles == 0) {
        mbarrier_arrive(shared_address(&storage_.item_wanted));
      }
#pragma unroll 1
      for (int tile = item.num_tiles - 1; tile >= 0; --tile) {
        if (tile == min(1, item.num_tiles - 1)) {
          mbarrier_arrive(shared_address(&storage_.item_wanted));
        }
        load_keys(item, kv_head, tile);
        if (tile == item.num_tiles - 1) {
          load_q(item);
        } else {
          load_values(item, kv_head, tile + 1);
        }
      }
      if (item.num_tiles > 0) {
        load_values(item, kv_head, 0);
      }
    }
  }

 private:
  __device__ __forceinline__ void load_q(const Item& item) {
#pragma unroll
    for (int w = 0; w < C::kWarpgroups; ++w) {
      mbarrier_wait(shared_address(&storage_.q_empty[w]), q_parity_ ^ 1);
      const uint32_t full = shared_address(&storage_.q_full[w]);
      mbarrier_arrive_expect_bytes(full, C::kQBytes);
      tma_load(shared_address(storage_.q[w]), &maps_.q, {0, item.first_token + w * C::kWarpgroupRows, 0, item.head, 0},
               full);
    }
    q_parity_ ^= 1;
  }

  __device__ __forceinline__ void load_keys(const Item& item, int kv_head, int tile) {
    mbarrier_wait(shared_address(&storage_.k_empty[k_.stage]), k_.parity ^ 1);
    const uint32_t full = shared_address(&storage_.k_full[k_.stage]);
    mbarrier_arrive_expect_bytes(full, C::kKBytes);
    tma_load(shared_address(storage_.k[k_.stage]), &maps_.k, {0, item.first_key + tile * C::kKeys, 0, kv_head, 0},
             full);
    k_.advance();
  }

  __device__ __forceinline__ void load_values(const Item& item, int kv_head, int tile) {
    mbarrier_wait(shared_address(&storage_.v_empty[v_.stage]), v_.parity ^ 1);
    const bool to_clean = (tile + 1) * C::kKeys > item.num_keys;
    const uint32_t full = shared_address(to_clean ? &storage_.v_landed[v_.stage] : &storage_.v_full[v_.stage]);
    mbarrier_arrive_expect_bytes(full, C::kVBytes);
    tma_load(shared_address(storage_.v[v_.stage]), &maps_.v, {0, item.first_key + tile * C::kKeys, 0, kv_head, 0},
             full);
    v_.advance();
  }

  const DensePrefillParams& params_;
  const TensorMaps& maps_;
  Storage<C>& storage_;
  Ring<C::kStages> k_, v_;
  uint32_t q_parity_ = 0;
};

// Behind a sequence's last value come those of another one, or none at all. Their probabilities are 0, but 0 times what
// is no number is none: they become zeros before any product reads them.
template <class C>
class Cleaner {
 public:
  static __device__ __forceinline__ void run(Storage<C>& storage, int lane) {
    ItemReader items(storage);
    uint32_t first_tile = 0;  // of the item, in the order of use
    uint32_t parities = 0;
    for (Item item; items.next(item, lane); first_tile += item.num_tiles) {
      // The tile with the end is the first that is taken.
      const int end = item.num_keys - (item.num_tiles - 1) * C::kKeys;
      if (item.num_tiles == 0 || end >= C::kKeys) {
        continue;
      }
      const int stage = first_tile % C::kStages;
      mbarrier_wait(shared_address(&storage.v_landed[stage]), parities >> stage & 1);
      parities ^= 1u << stage;
#pragma unroll 1
      for (int slice = 0; slice < C::kValueSlices; ++slice) {
        auto* rows = reinterpret_cast<uint4*>(storage.v[stage] + slice * C::kKeySliceBytes);
#pragma unroll 1
        for (int unit = end * (kSliceRowBytes / 16) + lane; unit < C::kKeys * (kSliceRowBytes / 16); unit += 32) {
          rows[unit] = make_uint4(0, 0, 0, 0);
        }
      }
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        mbarrier_arrive(shared_address(&storage.v_full[stage]));
      }
    }
  }
};

}  // namespace flash_mla::sm90::dense_prefill
