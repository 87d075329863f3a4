// The fifth-generation tensor cores and their memory. Every function is called by a whole warp, whose threads pass the
// same values (but for the registers of loads and stores). `kCtas`: 2 where a cluster's two CTAs multiply together, and
// then everywhere in a kernel. Tests put a functional emulation in this file's place:
// tests/sm100/README.md.
#pragma once

#include <cstdint>
#include <cute/arch/copy_sm100.hpp>
#include <utility>

#include "device/sm100/umma.h"

namespace flash_mla::inline device {

// ---- Registers: a warpgroup gives back what it does not need, another takes it.

template <int kRegisters>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ---- Tensor memory

// Writes the address of `columns` columns (a power of two from 32 on) to `destination` in shared memory, once they are
// free. Whoever allocates also frees, before the kernel ends. A warp of each CTA of a pair does so, and both get the
// same address.
template <int kCtas = 1>
__device__ __forceinline__ void tmem_allocate(uint32_t destination, uint32_t columns) {
  asm volatile("tcgen05.alloc.cta_group::%2.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(destination), "r"(columns),
               "n"(kCtas)
               : "memory");
}

template <int kCtas = 1>
__device__ __forceinline__ void tmem_free(uint32_t address, uint32_t columns) {
  asm volatile("tcgen05.dealloc.cta_group::%2.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns), "n"(kCtas)
               : "memory");
}

// This CTA will allocate no more.
template <int kCtas = 1>
__device__ __forceinline__ void tmem_relinquish() {
  asm volatile("tcgen05.relinquish_alloc_permit.cta_group::%0.sync.aligned;" ::"n"(kCtas) : "memory");
}

template <int kRepeat>
struct Tmem16x256;
template <>
struct Tmem16x256<2> {
  using Load = cute::SM100::TMEM::LOAD::SM100_TMEM_LOAD_16dp256b2x;
  using Store = cute::SM100::TMEM::STORE::SM100_TMEM_STORE_16dp256b2x;
};
template <>
struct Tmem16x256<4> {
  using Load = cute::SM100::TMEM::LOAD::SM100_TMEM_LOAD_16dp256b4x;
  using Store = cute::SM100::TMEM::STORE::SM100_TMEM_STORE_16dp256b4x;
};
template <>
struct Tmem16x256<8> {
  using Load = cute::SM100::TMEM::LOAD::SM100_TMEM_LOAD_16dp256b8x;
  using Store = cute::SM100::TMEM::STORE::SM100_TMEM_STORE_16dp256b8x;
};
template <>
struct Tmem16x256<16> {
  using Load = cute::SM100::TMEM::LOAD::SM100_TMEM_LOAD_16dp256b16x;
  using Store = cute::SM100::TMEM::STORE::SM100_TMEM_STORE_16dp256b16x;
};

// 16 lanes x 2 kRegisters columns. Register i holds lane (i / 2) % 2 * 8 + thread / 4 and column i / 4 * 8 + thread %
// 4 * 2 + i % 2 of the warp's 16 lanes at `address`, as accumulators of older tensor cores do. A warp reaches the
// quarter of the lanes that its number modulo 4 names. The registers are there after `tmem_wait_load`.
template <int kRegisters>
__device__ __forceinline__ void tmem_load_16x256(uint32_t address, float (&registers)[kRegisters]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    Tmem16x256<kRegisters / 4>::Load::copy(address, reinterpret_cast<uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, kRegisters>());
}

// The columns are there after `tmem_wait_store`.
template <int kRegisters>
__device__ __forceinline__ void tmem_store_16x256(uint32_t address, const float (&registers)[kRegisters]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    Tmem16x256<kRegisters / 4>::Store::copy(reinterpret_cast<const uint32_t&>(registers[kIndex])..., address);
  }(std::make_integer_sequence<int, kRegisters>());
}

// 32 lanes x 32 columns: register i of a thread is column i of its lane.
__device__ __forceinline__ void tmem_load_32x32(uint32_t address, float (&registers)[32]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    cute::SM100::TMEM::LOAD::SM100_TMEM_LOAD_32dp32b32x::copy(address,
                                                              reinterpret_cast<uint32_t&>(registers[kIndex])...);
  }(std::make_integer_sequence<int, 32>());
}

__device__ __forceinline__ void tmem_store_32x32(uint32_t address, const float (&registers)[32]) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    cute::SM100::TMEM::STORE::SM100_TMEM_STORE_32dp32b32x::copy(reinterpret_cast<const uint32_t&>(registers[kIndex])...,
                                                                address);
  }(std::make_integer_sequence<int, 32>());
}

// The registers of all loads so far; `registers` names them for the compiler, which must not use them earlier.
template <int kRegisters>
__device__ __forceinline__ void tmem_wait_load(float (&registers)[kRegisters]) {
  asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory");
#pragma unroll
  for (float& value : registers) {
    asm volatile("" : "+f"(value));
  }
}

__device__ __forceinline__ void tmem_wait_store() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

// Between tcgen05 instructions of different threads stands a barrier; before it the one fence, behind it the other.
__device__ __forceinline__ void tcgen05_fence_before() {
  asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory");
}
__device__ __forceinline__ void tcgen05_fence_after() {
  asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory");
}

// ---- Products

// d (+)= A B^T with A and B by descriptor; d is overwritten where `accumulate` is false. Of a pair the CTA of even rank
// issues; the first half of the rows of A and of B are its own, the others lie at the same place in the other CTA.
template <int kCtas = 1>
__device__ __forceinline__ void umma_ss(uint32_t d, uint64_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p, elected;\nelect.sync _|elected, 0xffffffff;\nsetp.ne.u32 p, %4, 0;\n"
      "@elected tcgen05.mma.cta_group::%5.kind::f16 [%0], %1, %2, %3, p;\n}" ::"r"(d),
      "l"(a), "l"(b), "r"(instruction), "r"(static_cast<uint32_t>(accumulate)), "n"(kCtas)
      : "memory");
}

// The same with A in tensor memory, two values to a column, in the lanes that d has. Where a CTA of a pair has 64 rows,
// of which lanes 64 to 127 hold the second half of d's columns, they hold the rows of A once more.
template <int kCtas = 1>
__device__ __forceinline__ void umma_ts(uint32_t d, uint32_t a, uint64_t b, uint32_t instruction, bool accumulate) {
  asm volatile(
      "{\n.reg .pred p, elected;\nelect.sync _|elected, 0xffffffff;\nsetp.ne.u32 p, %4, 0;\n"
      "@elected tcgen05.mma.cta_group::%5.kind::f16 [%0], [%1], %2, %3, p;\n}" ::"r"(d),
      "r"(a), "l"(b), "r"(instruction), "r"(static_cast<uint32_t>(accumulate)), "n"(kCtas)
      : "memory");
}

// One of the barrier's arrivals, once the products that this warp has issued so far are done.
__device__ __forceinline__ void umma_commit(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];\n}" ::"r"(barrier)
      : "memory");
}

// The same of a pair, in both of its CTAs.
__device__ __forceinline__ void umma_commit_pair(uint32_t barrier) {
  asm volatile(
      "{\n.reg .pred elected;\nelect.sync _|elected, 0xffffffff;\n"
      "@elected tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], "
      "%1;\n}" ::"r"(barrier),
      "h"(static_cast<uint16_t>(3))
      : "memory");
}

}  // namespace flash_mla::inline device
