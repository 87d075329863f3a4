// The split-KV schedule: which part of the machine computes which keys of which request.
#pragma once

#include <cstdint>

namespace flash_mla {

// Keys are handed out in blocks of this many, whatever the page size.
constexpr int kScheduleBlock = 64;

// One row of `tile_scheduler_metadata`: a contiguous run of blocks in the order of the requests. Engines write these
// rows themselves, so the layout is part of the interface.
struct ScheduleRow {
  int32_t begin_request;  // the number of requests, where the part has no work
  int32_t end_request;    // inclusive
  int32_t begin_block;    // within begin_request
  int32_t end_block;      // within end_request, exclusive
  int32_t begin_split;    // which piece of begin_request this part starts with
  int32_t first_request_is_split;
  int32_t last_request_is_split;
  int32_t reserved;
};
static_assert(sizeof(ScheduleRow) == 32);

// What a piece's set-up and epilogue cost, in blocks, and joining split requests the whole call.
constexpr int kPieceOverhead = 3;
constexpr int kCombineOverhead = 3;

// A part holds at most two requests that it shares with other parts: its first and its last.
constexpr int kPartialsPerPart = 2;

// The most parts that a plan of our own has; engines may write more rows.
constexpr int kMaxPlannedParts = 1024;

// Cuts of the batch-invariant mode depend on the request alone: up to `max_cuts` pieces of equal length, none shorter
// than kMinCutBlocks.
constexpr int kMaxCuts = 32;
constexpr int kMinCutBlocks = 8;

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

constexpr int fixed_cut_blocks(int num_blocks, int max_cuts) {
  const int even = ceil_div(num_blocks, max_cuts);
  return even > kMinCutBlocks ? even : kMinCutBlocks;
}

// A call whose lists are cut evenly needs no plan: each has so many pieces, as even as whole blocks make them.
constexpr int even_cuts(int num_blocks, int max_cuts, int min_blocks) {
  const int useful = ceil_div(num_blocks, min_blocks);
  return useful < max_cuts ? useful : max_cuts;
}

// Number of parts for `num_tiles` CTAs per part (row tiles times key heads) on a machine with `num_sms` SMs, one CTA
// each: one wave. More parts would balance better where the tiles do not divide the SMs, but the memory for partial
// results grows with parts * tiles and is bounded by one wave's.
constexpr int choose_num_parts(int64_t num_tiles, int num_sms) {
  const int64_t parts = num_sms / num_tiles;
  return static_cast<int>(parts < 1 ? 1 : parts > kMaxPlannedParts ? kMaxPlannedParts : parts);
}

}  // namespace flash_mla
