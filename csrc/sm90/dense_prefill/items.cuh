// Work items: from a number of the plan to rows of a sequence and head.
#pragma once

#include "device/prefill_items.cuh"
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
  __device__ __forceinline__ Item look_up(int number, int num_sequences) const {
    const auto [place, sequence, tile, head] = find_item(params_.planned, num_sequences, params_.h_q, number, lane_);
    const int first_row = tile * C::kRows, num_keys = sequence.k_length();
    Item item{};
    item.first_token = sequence.q_begin + first_row;
    item.num_rows = min(C::kRows, sequence.q_length() - first_row);
    item.head = head;
    item.first_key = sequence.k_begin;
    item.num_keys = num_keys;
    item.limit = params_.causal ? num_keys - (sequence.q_length() - 1 - first_row) : num_keys;
    const int most = params_.causal ? item.limit + item.num_rows - 1 : num_keys;
    item.num_tiles = num_keys > 0 && most > 0 ? ceil_div(most, C::kKeys) : 0;
    return item;
  }

  const DensePrefillParams& params_;
  Storage<C>& storage_;
  const int lane_;
};

}  // namespace flash_mla::sm90::dense_prefill
