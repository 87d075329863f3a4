// Sparse attention where at most 32 query rows attend to a list, whatever the architecture: keys, then columns of the
// values, are the rows of its products, and query rows their columns. Compile-time facts.
#pragma once

#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>

#include "core/params/sparse_attention.h"
#include "device/slices.h"
#include "device/sparse/walk.h"

namespace flash_mla::inline device {

// `kRows_`: query rows of a unit at the most, 16 or 32.
template <KVFormat kFormat_, KVFormat kExtraFormat_, int kHeadDim_, int kRows_, int kProducerWarps_,
          class Element_ = __nv_bfloat16>
struct FewRowsConfig {
  using Element = Element_;
  static constexpr KVFormat kFormat = kFormat_, kExtraFormat = kExtraFormat_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr bool kCopied = kFormat == KVFormat::kBf16;  // rows go straight to their places
  static constexpr bool kRopeBehindValues = kHeadDim > kHeadDimV;
  static constexpr bool kRopeInValues = kFormat == KVFormat::kModel1;

  static constexpr int kRanks = 1;  // CTAs that share a tile
  static constexpr int kRows = kRows_;
  static constexpr int kKeys = kScheduleBlock;
  static constexpr int kSlices = kHeadDim / kSliceColumns;
  static constexpr int kQSliceBytes = kRows * kSliceRowBytes;
  static constexpr int kSliceBytes = kKeys * kSliceRowBytes;
  static constexpr int kTileBytes = kSlices * kSliceBytes;
  static constexpr int kRopeSlice = kSlices - 1;

  static constexpr int kMathThreads = 128, kMathWarps = kMathThreads / 32;
  static constexpr int kProducerWarps = kProducerWarps_;
  static constexpr int kWarpKeys = kKeys / kProducerWarps;  // of a tile
  static constexpr int kProducerThreads = 32 * kProducerWarps;

  // Bytes of a row as they lie in the ring: the row, and MODEL1's scales behind it.
  static constexpr int ring_row_bytes(KVFormat format) {
    const KVLayout layout = layout_of(format);
    const int bytes = layout.row_stride() + (layout.scales_behind_page ? layout.scale_stride() : 0);
    return ceil_div(bytes, 16) * 16;
  }
  static constexpr int kRingRowBytes =
      std::max({16, ring_row_bytes(kFormat), kExtraFormat == KVFormat::kNone ? 0 : ring_row_bytes(kExtraFormat)});

  // Where producers stand in the lists, and what lies between memory and the tiles or the results: rows as they are in
  // memory, of the tile behind the one that is converted, by the producer warp that has the keys.
  using Walks = Walk[kProducerWarps];
  using Staging = unsigned char[kProducerWarps][kWarpKeys][kRingRowBytes];
};

}  // namespace flash_mla::inline device
