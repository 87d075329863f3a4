// Rows that are gathered from memory: what is known of the matrix that they are rows of.
#pragma once

#include <cstdint>

#include "device/slices.h"

namespace flash_mla::inline device {

// 16-bit values. `data` and `stride` are multiples of 16 bytes.
struct GatheredRows {
  const char* name;
  const void* data;
  int64_t rows, stride;  // stride: bytes
  int columns;
};

// What one gather brings: four rows of a slice.
constexpr int kGatherRows = 4, kGatherBytes = kGatherRows * kSliceRowBytes;

}  // namespace flash_mla::inline device
