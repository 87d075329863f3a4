// Work items of dense prefill: from a number of the plan to rows of a sequence and head.
#pragma once

#include "core/params/dense_prefill.h"

namespace flash_mla::inline device {

struct PrefillItem {
  int place;  // of the sequence in the plan
  PrefillSequence sequence;
  int tile;  // of the sequence's query rows
  int head;
};

// The last sequence whose first item is not behind `number`. One warp.
__device__ __forceinline__ int find_sequence(const PrefillSequence* planned, int num_sequences, int number, int lane) {
  int low = 0, high = num_sequences;
  while (high - low > 1) {
    const int step = ceil_div(high - low, 32), probe = low + lane * step;
    const bool before = probe < high && planned[probe].first_item <= number;
    // Lane 0 always is.
    low += (31 - __clz(__ballot_sync(~0u, before))) * step;
    high = min(high, low + step);
  }
  return low;
}

// One warp; `number` is one of the plan's.
__device__ __forceinline__ PrefillItem find_item(const PrefillSequence* planned, int num_sequences, int num_heads,
                                                 int number, int lane) {
  const int place = find_sequence(planned, num_sequences, number, lane);
  const PrefillSequence sequence = planned[place];
  // Rounds of heads_together heads; in a round, row tiles from the last one, which in a causal call sees the most
  // keys; the heads of a row tile next to each other.
  const int within = number - sequence.first_item;
  const int round_items = sequence.tiles * sequence.heads_together, round = within / round_items;
  const int first_head = round * sequence.heads_together, heads = min(sequence.heads_together, num_heads - first_head);
  const int in_round = within - round * round_items;
  return {place, sequence, sequence.tiles - 1 - in_round / heads, first_head + in_round % heads};
}

}  // namespace flash_mla::inline device
