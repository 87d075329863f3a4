// Work items: from a number of the plan to rows of a sequence and head, and from the scheduler warp to the others.
#pragma once

#include "device/sm90/barrier.cuh"
#include "sm90/dense_prefill/storage.h"

namespace flash_mla::sm90::dense_prefill {

// The stages of a ring in the order of use.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// Every warp of a role walks the same sequence of items by itself.
template <class C>
class ItemReader {
 public:
  explicit __device__ __forceinline__ ItemReader(Storage<C>& storage) : storage_(storage) {}

  // The next item for a whole warp; false behind the last.
  __device__ __forceinline__ bool next(Item& item, int lane) {
    wait_and_read(item);
    __syncwarp();
    return finish(item, lane == 0);
  }

  // The same for a thread on its own.
  __device__ __forceinline__ bool next(Item& item) {
    wait_and_read(item);
    return finish(item, true);
  }

 private:
  __device__ __forceinline__ void wait_and_read(Item& item) const {
    mbarrier_wait(shared_address(&storage_.item_full[slot_.stage]), slot_.parity);
    item = storage_.items[slot_.stage];
  }

  __device__ __forceinline__ bool finish(const Item& item, bool arrives) {
    if (arrives) {
      mbarrier_arrive(shared_address(&storage_.item_empty[slot_.stage]));
    }
    slot_.advance();
    return item.num_rows > 0;
  }

  Storage<C>& storage_;
  Ring<2> slot_;
};

// One warp. Which item a CTA takes next is decided when it needs one, since items differ in length: the first is that
// of its own number, the others are counted.
template <class C>
class Scheduler {
 public:
  __device__ __forceinline__ Scheduler(const DensePrefillParams& params, Storage<C>& storage, int lane)
      : params_(params), storage_(storage), lane_(lane) {}

  __device__ __forceinline__ void run() {
    const int num_items = params_.plan->num_items, num_sequences = params_.plan->num_sequences;
    Ring<2> slot;
    uint32_t wanted_parity = 0;
    int number = blockIdx.x;
    while (true) {
      Item item{};
      if (number < num_items) {
        item = look_up(number, num_sequences);
      }
      mbarrier_wait(shared_address(&storage_.item_empty[slot.stage]), slot.parity ^ 1);
      if (lane_ == 0) {
        storage_.items[slot.stage] = item;
        mbarrier_arrive(shared_address(&storage_.item_full[slot.stage]));
      }
      slot.advance();
      if (number >= num_items) {
        return;
      }
      mbarrier_wait(shared_address(&storage_.item_wanted), wanted_parity);
      wanted_parity ^= 1;
      if (lane_ == 0) {
        number = gridDim.x + atomicAdd(&params_.plan->num_taken, 1);
      }
      number = __shfl_sync(~0u, number, 0);
      __syncwarp();
    }
  }

 private:
  // The last sequence whose first item is not behind `number`.
  __device__ __forceinline__ int find_sequence(int number, int num_sequences) const {
    int low = 0, high = num_sequences;
    while (high - low > 1) {
      const int step = ceil_div(high - low, 32), probe = low + lane_ * step;
      const bool before = probe < high && params_.planned[probe].first_item <= number;
      // Lane 0 always is.
      low += (31 - __clz(__ballot_sync(~0u, before))) * step;
      high = min(high, low + step);
    }
    return low;
  }

  __device__ __forceinline__ Item look_up(int number, int num_sequences) const {
    const PrefillSequence sequence = params_.planned[find_sequence(number, num_sequences)];
    // Rounds of heads_together heads; in a round, row tiles from the last one, which in a causal call sees the most
    // keys; the heads of a row tile next to each other.
    const int within = number - sequence.first_item;
    const int round_items = sequence.row_tiles * sequence.heads_together, round = within / round_items;
    const int first_head = round * sequence.heads_together,
              heads = min(sequence.heads_together, params_.h_q - first_head);
    const int in_round = within - round * round_items, tile = sequence.row_tiles - 1 - in_round / heads;
    const int first_row = tile * C::kRows;
    Item item{};
    item.first_token = sequence.q_begin + first_row;
    item.num_rows = min(C::kRows, sequence.q_length - first_row);
    item.head = first_head + in_round % heads;
    item.first_key = sequence.k_begin;
    item.num_keys = sequence.k_length;
    item.limit = params_.causal ? sequence.k_length - (sequence.q_length - 1 - first_row) : sequence.k_length;
    const int most = params_.causal ? item.limit + item.num_rows - 1 : sequence.k_length;
    item.num_tiles = sequence.k_length > 0 && most > 0 ? ceil_div(most, C::kKeys) : 0;
    return item;
  }

  const DensePrefillParams& params_;
  Storage<C>& storage_;
  const int lane_;
};

}  // namespace flash_mla::sm90::dense_prefill
