// Which keys of an item's tile a query sees.
#pragma once

#include <cute/tensor.hpp>

#include <collective/fmha_fusion.hpp>

#include "core/params/dense_prefill_backward.h"

namespace flash_mla::sm100::dense_prefill_backward {

// What CUTLASS's parts take for the shape of the whole problem describes one item: query rows of a head, whole tiles,
// from the first tile that sees any of the keys on; keys; columns; and in place of (heads, sequences) how many keys the
// first row sees, and by how many more each further one does.
template <int kHeadDim>
using Problem = cute::tuple<int, int, cute::Int<kHeadDim>, cute::Int<kPrefillHeadDimV>, cute::tuple<int, int>>;

// CUTLASS asks a mask of this kind for every tile whose keys do not go beyond it, which those of an item never do.
struct Mask : cutlass::fmha::collective::ResidualMaskForBackward {
  // Rows of all query heads are counted on; a thread has scores of one row.
  template <class Scores, class PlaceOf, class Shape>
  __device__ __forceinline__ void apply_mask(Scores& scores, const PlaceOf& place_of, const Shape& item) const {
    using namespace cute;
    const int row = get<0>(place_of(0)) % get<0>(item);
    const int limit = min(get<1>(item), get<4, 0>(item) + row * get<4, 1>(item));
    if (limit >= kBackwardKeyTile) {
      return;
    }
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < size(scores); ++i) {
      if (get<1>(place_of(i)) >= limit) {
        scores(i) = -INFINITY;
      }
    }
  }
};

}  // namespace flash_mla::sm100::dense_prefill_backward
