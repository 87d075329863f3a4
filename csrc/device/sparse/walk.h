// Where the warps of a sparse attention kernel stand in their work.
#pragma once

#include <cstdint>

namespace flash_mla::inline device {

// A key tile arrives in two parts: the columns that are converted, and those that are copied as they are (the 64 RoPE
// columns, the last slice of a tile).
enum Part : int { kValues = 0, kRope = 1, kNumParts = 2 };

// What the math warps have to know of a piece of work. The producers hand it over together with Q.
struct PieceFacts {
  int num_tiles;  // 0: nothing to read, but the output still has to be written; -1: no more pieces
  int request, unit;
  int row_tile;  // in steps of the kernel's rows
  int partial;   // index of the partial result, -1: the piece is the whole list
  int limit;     // causal: the keys of the piece from its beginning that the request's first token sees
};

// A run of key tiles from one source, as a producer warp walks it.
struct Run {
  const int32_t* list;
  int position, length;  // of the next tile, in entries (of a block table: keys)
  int num_tiles;         // still to come
  uint32_t bits;         // struct Entry of the next tile
};

// Where a producer warp stands in the sequence of pieces. It walks it two tiles ahead, once a tile, and has no
// registers to keep this in between.
struct alignas(16) Walk {
  Run run;
  int item, part, unit, row_tile;                    // of the piece behind this one, as what follows:
  int request, next_length[2];                       //
  int begin_request, begin_block;                    // where the part begins,
  int end_request, end_block;                        // and ends: INT_MAX, where the last request does
  int second_tiles, second_position, second_length;  // the run over the second source that follows this one
  int num_pieces;                                    // begun so far
  bool guesses;                                      // takes every list for as long as it can be
  PieceFacts pending[4];                             // the last ones, by number
};

}  // namespace flash_mla::inline device
