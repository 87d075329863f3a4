// Warpgroup matrix products on tiles in 128-byte-swizzled slices: a slice is R rows x 64 16-bit columns, row r at 128
// r, its 16-byte units permuted by r % 8.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <type_traits>
#include <utility>

#include "device/slices.h"

namespace flash_mla::inline device {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Shared-memory descriptor of an operand with 128-byte swizzle. `leading` bytes lie between slices (used where the
// operand spans several), 1,024 between groups of 8 rows. Only the low word depends on the address, so a step of so
// many bytes is one addition: descriptors that are built anew for each product keep the tensor cores waiting. In a
// cluster addresses have the CTA's rank above their 18 bits.
class Descriptor {
 public:
  __device__ __forceinline__ Descriptor(uint32_t address, uint32_t leading)
      : low_((address & 0x3ffff) >> 4 | (leading >> 4) << 16) {}
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const { return descriptor<kSliceRowBytes, 1>(bytes); }

 protected:
  template <int kRowBytes, uint32_t kSwizzle>
  __device__ __forceinline__ uint64_t descriptor(uint32_t bytes) const {
    constexpr uint32_t kHigh = (8 * kRowBytes >> 4) | kSwizzle << 30;
    return static_cast<uint64_t>(kHigh) << 32 | (low_ + (bytes >> 4));
  }

 private:
  uint32_t low_;
};

// The same with rows of 64 bytes and 64-byte swizzle: row r at 64 r, its 16-byte units permuted by r / 2 % 4.
class Descriptor64 : Descriptor {
 public:
  explicit __device__ __forceinline__ Descriptor64(uint32_t address) : Descriptor(address, 16) {}
  __device__ __forceinline__ uint64_t at(uint32_t bytes) const { return descriptor<64, 2>(bytes); }
};

template <class T>
struct WgmmaAtoms {
  using Major = cute::SM90::GMMA::Major;
  static constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  // Scores: 64 rows x 64 keys, both operands with the inner dimension contiguous.
  using Scores = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x64x16_F32BF16BF16_SS<Major::K, Major::K>,
                                    cute::SM90::GMMA::MMA_64x64x16_F32F16F16_SS<Major::K, Major::K>>;
  // Output: 64 rows x 128 columns, the values with the column contiguous.
  using OutputRS = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_RS<Major::K, Major::MN>,
                                      cute::SM90::GMMA::MMA_64x128x16_F32F16F16_RS<Major::K, Major::MN>>;
  using OutputSS = std::conditional_t<kBf16, cute::SM90::GMMA::MMA_64x128x16_F32BF16BF16_SS<Major::K, Major::MN>,
                                      cute::SM90::GMMA::MMA_64x128x16_F32F16F16_SS<Major::K, Major::MN>>;
};

// The same with keys, and with the columns of the values, as rows of the result: A is the keys or the values, B the few
// rows of the other side, with the inner dimension contiguous.
template <int kColumns>
struct WgmmaSwappedAtoms {
  using Major = cute::SM90::GMMA::Major;
  static_assert(kColumns == 16 || kColumns == 32);
  template <Major kMajorA>
  using Atom = std::conditional_t<kColumns == 16, cute::SM90::GMMA::MMA_64x16x16_F32BF16BF16_SS<kMajorA, Major::K>,
                                  cute::SM90::GMMA::MMA_64x32x16_F32BF16BF16_SS<kMajorA, Major::K>>;
  using Scores = Atom<Major::K>;
  using Output = Atom<Major::MN>;
};

// d += A B, or d = A B where `accumulate` is false. A and B by descriptor.
template <class Atom, int kRegisters>
__device__ __forceinline__ void wgmma_ss(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
  const auto scale = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    Atom::fma(a, b, d[kIndex]..., scale);
  }(std::make_integer_sequence<int, kRegisters>());
}

// The same with A, a 64 x 16 fragment, from registers.
template <class Atom, int kRegisters>
__device__ __forceinline__ void wgmma_rs(float (&d)[kRegisters], const uint32_t* a, uint64_t b, bool accumulate) {
  const auto scale = accumulate ? cute::SM90::GMMA::ScaleOut::One : cute::SM90::GMMA::ScaleOut::Zero;
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    Atom::fma(a[0], a[1], a[2], a[3], b, d[kIndex]..., scale);
  }(std::make_integer_sequence<int, kRegisters>());
}

}  // namespace flash_mla::inline device
