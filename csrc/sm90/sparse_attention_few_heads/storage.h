// Shared-memory map of the sparse attention kernels that keep FP8 rows as they are.
#pragma once

#include "sm90/sparse_attention/storage.h"
#include "sm90/sparse_attention_few_heads/config.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

using sparse_attention::PieceFacts, sparse_attention::Walk;

// A query row: a score times `scale` minus `maximum` is an exponent, base 2.
struct Reference {
  float scale, maximum;
};

// A query row at the end of a piece: by what its columns are multiplied, and where they go; -1: nowhere.
struct RowResult {
  float scale;
  int64_t out;
};

template <class C>
struct Storage {
  // Probabilities lie where the tile's RoPE columns were, if those are no part of the values: they are dead once
  // scored.
  static constexpr int kProbabilityTiles = C::kRopeBehindValues ? 0 : kSides;
  static constexpr int kFixedBytes = C::kSlices * C::kQSliceBytes + kProbabilityTiles * C::kTileGroups * C::kGroupBytes;
  static constexpr int kSmallBytes = 7 * 1024;
  static constexpr int kGroups =
      (232448 - kFixedBytes - kSmallBytes) / (C::kGroupKeys * C::kRowBytes + (C::kHasRope ? C::kGroupBytes : 0));

  alignas(1024) unsigned char q[C::kSlices * C::kQSliceBytes];
  // RoPE columns, 128 bytes a row, 16-byte units permuted by the row.
  alignas(1024) unsigned char rope[C::kHasRope ? kGroups : 1][C::kHasRope ? C::kGroupBytes : 16];
  alignas(1024) unsigned char probabilities[std::max(kProbabilityTiles * C::kTileGroups, 1)]
                                           [kProbabilityTiles ? C::kGroupBytes : 16];
  alignas(16) unsigned char rows[kGroups][C::kGroupKeys * C::kRowBytes];
  Reference references[C::kRows];
  float factors[kSides][C::kRows];     // by which a tile's scoring moved the references
  float shifts[C::kRows];              // by which the references move now
  float scratch[kSides][4][C::kRows];  // maxima or sums, by warp
  float maxima[kSides][4][C::kRows];   // largest scores, base 2
  RowResult results[C::kRows];
  bool started[C::kRows];  // the row has had a key
  bool all_started;
  alignas(4) bool sums[kSides][4];  // by a tile's scoring warps: float32 scales are no halves
  bool moved[kSides];               // `factors` count
  uint32_t valid[kGroups];          // a bit for each key that counts
  PieceFacts pieces[2];             // by parity of the piece
  Walk walks[C::kProducerWarps];
  uint64_t full[kGroups], empty[kGroups];
  uint64_t q_full, q_empty;
  uint64_t probabilities_full[kSides];  // and the references that they are relative to
};

template <class C>
constexpr bool kStorageFits = sizeof(Storage<C>) <= 232448;

// A place in the ring, and the parity of its barriers' phases.
template <class C>
struct RingPlace {
  int group = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int groups) {
    group += groups;
    if (group >= Storage<C>::kGroups) {
      group -= Storage<C>::kGroups;
      parity ^= 1;
    }
  }
  __device__ __forceinline__ RingPlace operator+(int groups) const {
    RingPlace place = *this;
    place.advance(groups);
    return place;
  }
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
