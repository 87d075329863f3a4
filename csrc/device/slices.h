// Tiles of matrix operands in shared memory are cut into slices of 64 columns of 16 bits: 128 bytes a row, whose
// 16-byte units are permuted by the row (unit ^ row % 8).
#pragma once

namespace flash_mla::inline device {

constexpr int kSliceColumns = 64;
constexpr int kSliceRowBytes = 128;

}  // namespace flash_mla::inline device
