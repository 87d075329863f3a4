// Shared-memory map of sparse attention for few query rows. Slices are rows of 64 columns of 16-bit values, 128 bytes a
// row, whose 16-byte units are permuted by the row.
#pragma once

#include "device/barrier.cuh"
#include "device/few_rows/config.h"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// `kProbabilityTiles`: one, or one for each slot.
template <class C, int kProbabilityTiles>
struct FewRowsStorage {
  // Probabilities lie in their slot's RoPE slice where that is no part of the values: it is dead once it is scored.
  static constexpr int kProbabilityBytes = C::kRopeBehindValues ? 0 : kProbabilityTiles * C::kQSliceBytes;

  alignas(1024) unsigned char q[C::kSlices * C::kQSliceBytes];
  alignas(1024) unsigned char k[2][C::kTileBytes];
  alignas(1024) unsigned char probabilities[kProbabilityBytes + 16];
  alignas(16) typename C::Staging staging;
  float row_max[C::kMathWarps][C::kRows];  // largest scores, base 2, by math warp
  float row_sum[C::kMathWarps][C::kRows];
  alignas(8) unsigned char valid[2][C::kProducerWarps];  // of a slot: a bit for each key that counts
  PieceFacts pieces[2];                                  // by parity of the piece
  typename C::Walks walks;
  uint64_t k_full[2];
  uint64_t k_empty[2];
  uint64_t q_full, q_empty;

  __device__ __forceinline__ uint32_t tile_of(int slot) const { return shared_address(k[0]) + slot * C::kTileBytes; }

  __device__ __forceinline__ uint32_t probabilities_of(int slot) const {
    if constexpr (C::kRopeBehindValues) {
      return tile_of(slot) + C::kRopeSlice * C::kSliceBytes;
    } else {
      return shared_address(probabilities) + (kProbabilityTiles == 1 ? 0 : slot * C::kQSliceBytes);
    }
  }
};

// By warps; where rows are copied by all threads besides.
template <class C>
constexpr int kKeysFullArrivals = C::kProducerWarps + (C::kCopied ? C::kProducerThreads : 0);

template <class Storage>
constexpr bool kFewRowsStorageFits = sizeof(Storage) <= 232448;

}  // namespace flash_mla::inline device
