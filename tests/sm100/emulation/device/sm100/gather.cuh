// In place of csrc/device/sm100/gather.cuh: the same functions, done by the emulation.
#pragma once

#include "device/sm100/gather.h"
#include "emulation/gather.cuh"

namespace flash_mla::inline device {

using GatherMap = emulation::GatherMap;

template <class T>
GatherMap gather_map(const GatheredRows& matrix) {
  static_assert(sizeof(T) == 2);
  return {static_cast<const uint16_t*>(matrix.data), matrix.rows, matrix.stride, matrix.columns};
}

__device__ __forceinline__ void tma_gather4(uint32_t destination, const GatherMap* map, int column, const int4& rows,
                                            uint32_t barrier) {
  emulation::gather({map, destination, barrier, column, {rows.x, rows.y, rows.z, rows.w}});
}

}  // namespace flash_mla::inline device
