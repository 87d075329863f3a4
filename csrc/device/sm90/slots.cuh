// The phases of a pair of shared-memory slots.
#pragma once

#include <cstdint>

namespace flash_mla::inline device {

// The key slots in the order of use. A step takes slot 0, then slot 1; a piece begins with slot 0, so slots advance on
// their own.
struct SlotPhases {
  uint32_t bits = 0;
  __device__ __forceinline__ uint32_t parity(int slot) const { return bits >> slot & 1; }
  __device__ __forceinline__ void advance(int slot) { bits ^= 1u << slot; }
};

}  // namespace flash_mla::inline device
