// What tcgen05.mma is told of its operands: the instruction descriptor, and the descriptors of matrices in shared
// memory. Bits as PTX defines them; nothing here runs on a device alone, so that the host checks them against CuTe.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "device/slices.h"

namespace flash_mla::inline device {

// Which dimension of an operand is contiguous: the one that is summed over, or the other.
enum class Major : uint32_t { kInner = 0, kOuter = 1 };

// kind::f16, float32 results. M is 64 or 128 for one CTA, 128 or 256 for two; N a multiple of 8 (16 from M 128 on).
template <class T>
constexpr uint32_t umma_instruction(int m, int n, Major a, Major b) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  constexpr uint32_t kFloat32 = 1, kFormat = std::is_same_v<T, __nv_bfloat16> ? 1 : 0;
  return kFloat32 << 4 | kFormat << 7 | kFormat << 10 | static_cast<uint32_t>(a) << 15 |
         static_cast<uint32_t>(b) << 16 | static_cast<uint32_t>(n) >> 3 << 17 | static_cast<uint32_t>(m) >> 4 << 24;
}

// A matrix in 128-byte-swizzled slices. `leading` bytes lie between slices (used where an operand of major kOuter spans
// several), 1,024 between groups of 8 rows. Only the low word depends on the address, so a step of so many bytes is one
// addition.
class UmmaDescriptor {
 public:
  constexpr UmmaDescriptor(uint32_t address, uint32_t leading) : low_((address >> 4) | (leading >> 4) << 16) {}
  constexpr uint64_t at(uint32_t bytes) const {
    constexpr uint32_t kVersion = 1, kSwizzle128 = 2;
    constexpr uint32_t kHigh = (8 * kSliceRowBytes >> 4) | kVersion << 14 | kSwizzle128 << 29;
    return static_cast<uint64_t>(kHigh) << 32 | (low_ + (bytes >> 4));
  }

 private:
  uint32_t low_;
};

// Addresses of tensor memory: 128 lanes x 512 columns of 32 bits.
constexpr int kTmemLanes = 128, kTmemColumns = 512;
constexpr uint32_t tmem_lane(uint32_t lane) { return lane << 16; }

}  // namespace flash_mla::inline device
