// In place of csrc/device/sm100/tcgen05.cuh: the same functions, done by the emulation.
#pragma once

#include <cstdint>
#include <utility>

#include "device/sm100/umma.h"
#include "emulation/emulation.cuh"

namespace flash_mla::inline device {

// The emulation needs more registers than the kernels plan for, but not all that they may have.
template <int kRegisters>
__device__ __forceinline__ void keep_registers() {}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {}

template <int kCtas = 1>
__device__ __forceinline__ void tmem_allocate(uint32_t destination, uint32_t columns) {
  emulation::allocate<kCtas>(destination, columns);
}

template <int kCtas = 1>
__device__ __forceinline__ void tmem_free(uint32_t address, uint32_t columns) {
  emulation::free<kCtas>(address, columns);
}

template <int kCtas = 1>
__device__ __forceinline__ void tmem_relinquish() {
  emulation::relinquish();
}

// Lazy: registers are garbage until they are waited for.
template <int kRegisters>
__device__ __forceinline__ void tmem_scramble(float (&registers)[kRegisters]) {
  for (float& value : registers) {
    value = emulation::kLazy ? __uint_as_float(__float_as_uint(value) ^ 0x5A5A5A5A) : value;
  }
}

template <int kRegisters>
__device__ __forceinline__ void tmem_load_16x256(uint32_t address, float (&registers)[kRegisters]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    emulation::load<emulation::Shape::k16x256>(address, reinterpret_cast<uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, kRegisters>());
  tmem_scramble(registers);
}

template <int kRegisters>
__device__ __forceinline__ void tmem_store_16x256(uint32_t address, const float (&registers)[kRegisters]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    emulation::store<emulation::Shape::k16x256>(address, reinterpret_cast<const uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, kRegisters>());
}

__device__ __forceinline__ void tmem_load_32x32(uint32_t address, float (&registers)[32]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    emulation::load<emulation::Shape::k32x32>(address, reinterpret_cast<uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, 32>());
  tmem_scramble(registers);
}

__device__ __forceinline__ void tmem_store_32x32(uint32_t address, const float (&registers)[32]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    emulation::store<emulation::Shape::k32x32>(address, reinterpret_cast<const uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, 32>());
}

template <int kRegisters>
__device__ __forceinline__ void tmem_wait_load(float (&registers)[kRegisters]) {
  __syncwarp();
  tmem_scramble(registers);
}

__device__ __forceinline__ void tmem_wait_store() { emulation::wait_store(); }

__device__ __forceinline__ void tcgen05_fence_before() { __threadfence(); }
__device__ __forceinline__ void tcgen05_fence_after() { __threadfence(); }

template <int kCtas = 1>
__device__ __forceinline__ void umma_ss(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  emulation::multiply({a, b, d, instruction, false, accumulate, kCtas});
}

template <int kCtas = 1>
__device__ __forceinline__ void umma_ts(uint32_t d, uint32_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  emulation::multiply({a, b, d, instruction, true, accumulate, kCtas});
}

__device__ __forceinline__ void umma_commit(uint32_t barrier) { emulation::commit(barrier); }

__device__ __forceinline__ void umma_commit_pair(uint32_t barrier) { emulation::commit(barrier, 3); }

}  // namespace flash_mla::inline device
