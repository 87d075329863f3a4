// Which keys a row sees: all of its sequence, or in a causal call those up to its own place counted from the end.
#pragma once

#include <cute/tensor.hpp>

namespace flash_mla::sm100::dense_prefill {

// Place of the causal flag in the problem shape (queries, keys, head dims, heads, causal).
constexpr int kCausalMode = 4;

// In CUTLASS's terms; a trip is a tile of keys. CUTLASS has a type for each kind of mask: this one decides while it
// runs, at half of the kernels to compile. It also counts masked trips exactly, and calls for no tile without keys.
struct Mask {
  template <class Shape>
  __device__ __forceinline__ static int keys_of_row(int row, const Shape& shape) {
    using namespace cute;
    const int keys = get<1>(shape);
    return get<kCausalMode>(shape) ? min(keys, row + 1 + keys - get<0>(shape)) : keys;
  }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_trip_count(const Block& block, const Tile&, const Shape& shape) const {
    using namespace cute;
    constexpr int kRows = get<0>(Tile{}), kKeys = get<1>(Tile{});
    return ceil_div(keys_of_row((get<0>(block) + 1) * kRows - 1, shape), kKeys);
  }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_unmasked_trip_count(const Block& block, const Tile&, const Shape& shape) const {
    using namespace cute;
    constexpr int kRows = get<0>(Tile{}), kKeys = get<1>(Tile{});
    return max(keys_of_row(get<0>(block) * kRows, shape), 0) / kKeys;
  }

  template <class Block, class Tile, class Shape>
  __device__ __forceinline__ int get_masked_trip_count(const Block& block, const Tile& tile, const Shape& shape) const {
    return get_trip_count(block, tile, shape) - get_unmasked_trip_count(block, tile, shape);
  }

  // A thread has scores of one row.
  template <class Scores, class Places, class Shape>
  __device__ __forceinline__ void apply_mask(Scores& scores, const Places& places, const Shape& shape) const {
    using namespace cute;
    const int limit = keys_of_row(get<0>(places(0)), shape);
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      if (get<1>(places(i)) >= limit) {
        scores(i) = -INFINITY;
      }
    }
  }
};

}  // namespace flash_mla::sm100::dense_prefill
