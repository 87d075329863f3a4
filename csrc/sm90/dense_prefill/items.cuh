// Work items: from a number of the plan to rows of a sequence and head.
#pragma once

#include "sm90/dense_prefill/storage.h"
#include "sm90/items.cuh"

namespace flash_mla::sm90::dense_prefill {

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
    const int round_items = sequence.tiles * sequence.heads_together, round = within / round_items;
    const int first_head = round * sequence.heads_together,
              heads = min(sequence.heads_together, params_.h_q - first_head);
    const int in_round = within - round * round_items, tile = sequence.tiles - 1 - in_round / heads;
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
