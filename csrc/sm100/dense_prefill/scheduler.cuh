// Tile scheduler for CUTLASS's kernel: a CTA takes the work item of its number in the plan.
#pragma once

#include <cute/tensor.hpp>

#include "device/prefill_items.cuh"

namespace flash_mla::sm100::dense_prefill {

// CUTLASS reads running lengths at a sequence's number and the one behind it. The plan has both ends of a sequence next
// to each other: its number, in running lengths that begin at the first end of the first sequence, is this many times
// its place in the plan.
constexpr int kEndsStride = sizeof(PrefillSequence) / sizeof(int32_t);

class PlannedTile {
 public:
  struct Params {
    const PrefillPlan* plan;
    const PrefillSequence* planned;
    int h_q;
    bool causal;
  };

  __device__ __forceinline__ explicit PlannedTile(const Params& params) {
    const int number = blockIdx.x;
    if (number >= params.plan->num_items) {
      return;
    }
    const PrefillItem item =
        find_item(params.planned, params.plan->num_sequences, params.h_q, number, threadIdx.x % 32);
    const PrefillSequence& sequence = item.sequence;
    tile_ = item.tile;
    head_ = item.head;
    sequence_ = item.place * kEndsStride;
    // CUTLASS wants at least one key for a tile; rows without any are not its business (keyless_rows.h).
    const int last_row = min((item.tile + 1) * prefill_row_tile(100), sequence.q_length()) - 1;
    valid_ = sequence.k_length() > 0 && (!params.causal || last_row + sequence.k_length() >= sequence.q_length());
  }

  __device__ __forceinline__ bool is_valid() const { return valid_; }

  // Tile of query rows, nothing, (head, sequence).
  __device__ __forceinline__ auto get_block_coord() const {
    return cute::make_coord(tile_, cute::_0{}, cute::make_coord(head_, sequence_));
  }

  __device__ __forceinline__ PlannedTile& operator++() {
    valid_ = false;
    return *this;
  }

 private:
  bool valid_ = false;
  int tile_ = 0, head_ = 0, sequence_ = 0;
};

}  // namespace flash_mla::sm100::dense_prefill
