// From a fragment of 64 keys x 64 columns to the sums of the keys' rows in device memory.
#pragma once

#include "device/barrier.cuh"
#include "sm90/sparse_prefill_backward/config.h"

namespace flash_mla::sm90::sparse_prefill_backward {

// `a` where the condition holds, else `b`. The compiler would move its own selection in front of the wait for the
// products that it selects from, and then serialises them.
__device__ __forceinline__ float select(bool condition, float a, float b) {
  float selected;
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %3, 0;\nselp.f32 %0, %1, %2, p;\n}"
               : "=f"(selected)
               : "f"(a), "f"(b), "r"(static_cast<uint32_t>(condition)));
  return selected;
}

// Not before it is needed: there are no registers to keep it in.
__device__ __forceinline__ int load_slot(const int* slots, int key) {
  int slot;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(slot) : "r"(shared_address(slots + key)));
  return slot;
}

// Where `adds`. Without a branch: where one joins while products are in flight, the compiler waits for all of them.
__device__ __forceinline__ void add4_if(bool adds, float* to, float a, float b, float c, float d) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %5, 0;\n@p red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to),
               "f"(a), "f"(b), "f"(c), "f"(d), "r"(static_cast<uint32_t>(adds))
               : "memory");
}

__device__ __forceinline__ void add_units(int64_t* to, int64_t units) {
  asm volatile("red.global.add.u64 [%0], %1;" ::"l"(to), "l"(units) : "memory");
}

// Lanes that differ in one bit exchange halves of what they have: where the bit is 0, a lane gives b and gets a's
// counterpart; where it is 1, the other way round. Then the former has both a, the latter both b, in the order of
// lanes.
template <int kBit>
__device__ __forceinline__ void exchange(int lane, float& a, float& b) {
  const bool upper = lane & kBit;
  const float received = __shfl_xor_sync(~0u, select(upper, a, b), kBit);
  a = upper ? received : a;
  b = upper ? b : received;
}

// A fragment's thread has two keys, `row` and the one 8 further, and pairs of columns. After two exchanges it has four
// columns in a row, and eight lanes 32 columns of a key: the memory takes 128 bytes at a time better than 64.
template <class C>
__device__ __forceinline__ void scatter_floats(float* sums, const int* slots, int row, int lane, int column,
                                               float (&terms)[32]) {
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
#pragma unroll
    for (int j = i; j < i + 4; ++j) {
      exchange<1>(lane, terms[j], terms[j + 4]);
    }
  }
#pragma unroll
  for (int i = 0; i < 32; i += 16) {
#pragma unroll
    for (int j = i; j < i + 8; ++j) {
      exchange<4>(lane, terms[j], terms[j + 8]);
    }
  }
  const int within = lane / 4 % 2 * 16 + lane % 2 * 8 + lane % 4 / 2 * 4;
#pragma unroll
  for (int r = 0; r < 4; ++r) {  // keys: r / 2 of the lane's two, r % 2 of the two that eight lanes have
    const int slot = load_slot(slots, (row & ~1) + 8 * (r / 2) + r % 2);
    float* to = sums + static_cast<int64_t>(slot) * C::kColumns + column + within;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int at = 16 * i + 8 * (r % 2) + 2 * (r / 2);
      add4_if(slot >= 0, to + 32 * i, terms[at], terms[at + 1], terms[at + 4], terms[at + 5]);
    }
  }
}

template <class C>
__device__ __forceinline__ void scatter_units(const FixedPointSums& fixed, const int* slots, int row, int lane,
                                              int column, const float (&terms)[32]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int slot = slots[row + 8 * r];
    if (slot >= 0) {
      const float factor = fixed.units_per_one[slot];
      int64_t* to = fixed.sums + static_cast<int64_t>(slot) * C::kColumns + column + lane % 4 * 2;
      bool fits = true;
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const float units = terms[i / 2 * 4 + 2 * r + i % 2] * factor;
        fits &= fabsf(units) < kMostUnits;
        add_units(to + i / 2 * 8 + i % 2, __float2ll_rn(units));
      }
      if (!fits) {
        fixed.overflows[slot] = 1;
      }
    }
  }
}

// Adds terms of 64 keys x 64 columns from `column` on to the keys' sums. `slots`: of the keys; -1 is none.
template <class C>
__device__ __forceinline__ void scatter(const SparsePrefillBackwardParams& params, const int* slots, int row, int lane,
                                        int column, float (&terms)[32]) {
  if constexpr (C::kFixedPoint) {
    scatter_units<C>(params.fixed, slots, row, lane, column, terms);
  } else {
    scatter_floats<C>(params.sums, slots, row, lane, column, terms);
  }
}

}  // namespace flash_mla::sm90::sparse_prefill_backward
