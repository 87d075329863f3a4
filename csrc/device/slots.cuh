// The phases of shared-memory slots that are filled again and again.
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

// The stages of a ring in the order of use.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

}  // namespace flash_mla::inline device
