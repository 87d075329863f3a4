// Division by a number that the host knows and the compiler does not: one multiplication.
#pragma once

#include <cstdint>

namespace flash_mla {

struct Divisor {
  int value;
  uint32_t multiplier;
  int shift;

  // Of 0 <= n < 2^31. With value <= 2^l and multiplier * value = 2^shift + e, 0 < e <= 2^l, the result is exact since
  // e * n < 2^shift.
  constexpr int divide(int n) const {
    return static_cast<int>(static_cast<uint64_t>(static_cast<uint32_t>(n)) * multiplier >> shift);
  }
};

constexpr Divisor make_divisor(int value) {
  int shift = 31;
  while (int64_t{1} << (shift - 31) < value) {
    ++shift;
  }
  return {value, static_cast<uint32_t>((uint64_t{1} << shift) / static_cast<uint64_t>(value) + 1), shift};
}

static_assert(make_divisor(1).divide(INT32_MAX) == INT32_MAX && make_divisor(7).divide(INT32_MAX) == INT32_MAX / 7);
static_assert(make_divisor(INT32_MAX).divide(INT32_MAX) == 1 && make_divisor(INT32_MAX).divide(INT32_MAX - 1) == 0);
static_assert(make_divisor(128).divide(127) == 0 && make_divisor(1 << 30).divide(1 << 30) == 1);

}  // namespace flash_mla
