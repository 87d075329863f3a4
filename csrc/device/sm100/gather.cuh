// Rows by their numbers, four at a time: TMA's tile::gather4. Tests put a functional emulation in this file's place.
#pragma once

#include "device/sm100/gather.h"
#include "device/tensor_maps.h"

namespace flash_mla::inline device {

using GatherMap = CUtensorMap;

// Boxes of one row and 64 columns, whose 16-byte units are permuted as slices have them.
template <class T>
GatherMap gather_map(const GatheredRows& matrix) {
  const TensorMapShape shape{kTensorMapType<T>,
                             matrix.data,
                             {static_cast<cuuint64_t>(matrix.columns), static_cast<cuuint64_t>(matrix.rows)},
                             {static_cast<cuuint64_t>(matrix.stride)},
                             {kSliceColumns, 1},
                             CU_TENSOR_MAP_SWIZZLE_128B,
                             2};
  CUtensorMap map;
  const CUresult status = encode(shape, map);
  check(status == CUDA_SUCCESS, ErrorKind::kCuda, "cuTensorMapEncodeTiled failed with ", static_cast<int>(status),
        " for ", matrix.name, " of ", matrix.rows, " rows and ", matrix.columns, " columns, stride ", matrix.stride);
  return map;
}

// Columns `column` to `column` + 63 of four rows become four rows of a slice; zeros where there is no such row or
// column, and then nothing is read. `destination` is a multiple of 128 bytes; the barrier counts `kGatherBytes`. Called
// by a whole warp, whose threads pass the same values.
__device__ __forceinline__ void tma_gather4(uint32_t destination, const GatherMap* map, int column, const int4& rows,
                                            uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected cp.async.bulk.tensor.2d.shared::cta.global.tile::gather4.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, %5, %6}], [%7];\n}" ::"r"(destination),
      "l"(map), "r"(column), "r"(rows.x), "r"(rows.y), "r"(rows.z), "r"(rows.w), "r"(barrier)
      : "memory");
}

}  // namespace flash_mla::inline device
