// In front of csrc/device/barrier.cuh. Lazy: what a barrier counts arrives when somebody waits for it.
#pragma once

#ifdef FLASH_MLA_EMULATION_LAZY
#define mbarrier_wait mbarrier_wait_alone
#endif
#include_next "device/barrier.cuh"
#ifdef FLASH_MLA_EMULATION_LAZY
#undef mbarrier_wait

#include "emulation/gather.cuh"

namespace flash_mla::inline device {

__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!emulation::has_ended(barrier, parity)) {
    emulation::finish_gathers(barrier);
  }
}

}  // namespace flash_mla::inline device
#endif
