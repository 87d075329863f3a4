// Where the instructions of the fifth-generation tensor cores find their data: pure arithmetic, which the host checks
// against CuTe (tests/sm100/layouts.cpp). Bits and tables as in the PTX manual.
#pragma once

#include <cstdint>

namespace flash_mla::emulation {

// ---- Matrices in shared memory: which address the value (outer, inner) of an operand has, counted in 16-bit values.

struct SharedMatrix {
  uint32_t start, leading, stride;  // bytes
  uint32_t version, base_offset, leading_mode;
  uint32_t swizzle_bits;  // units of 16 bytes are permuted among 2 ** so many
  bool known;
};

constexpr SharedMatrix decode_matrix(uint64_t descriptor) {
  const auto bits = [descriptor](int from, int count) {
    return static_cast<uint32_t>(descriptor >> from & ((uint64_t{1} << count) - 1));
  };
  const uint32_t layout = bits(61, 3);
  return {bits(0, 14) << 4,
          bits(16, 14) << 4,
          bits(32, 14) << 4,
          bits(46, 2),
          bits(49, 3),
          bits(52, 1),
          layout == 2   ? 3u
          : layout == 4 ? 2u
          : layout == 6 ? 1u
                        : 0u,
          layout % 2 == 0};
}

// Rows of 16 << swizzle_bits bytes, eight of which are a group; the address itself says how its units are permuted.
constexpr uint32_t address_of(const SharedMatrix& matrix, bool outer_contiguous, int outer, int inner) {
  const uint32_t row_bytes = 16u << matrix.swizzle_bits, row_values = row_bytes / 2;
  uint32_t address = matrix.start;
  if (outer_contiguous && matrix.swizzle_bits == 0) {
    address += outer / 8 * matrix.stride + outer % 8 * 2 + inner / 8 * matrix.leading + inner % 8 * 16;
  } else if (outer_contiguous) {
    address += outer / row_values * matrix.leading + outer % row_values * 2 + inner / 8 * matrix.stride +
               inner % 8 * row_bytes;
  } else {
    address += outer / 8 * matrix.stride + outer % 8 * row_bytes;
    address += matrix.swizzle_bits == 0 ? inner / 8 * matrix.leading + inner % 8 * 2 : inner * 2;
  }
  return address ^ (address >> 7 & ((1u << matrix.swizzle_bits) - 1)) << 4;
}

// ---- Instructions

struct Instruction {
  int result_format, a_format, b_format;
  bool negate_a, negate_b, outer_a, outer_b;
  int m, n;
  bool known;  // nothing is asked for that the emulation does not do
};

constexpr Instruction decode_instruction(uint32_t bits) {
  constexpr uint32_t kOther = 0x3 | 1u << 2 | 1u << 3 | 1u << 6 | 1u << 23 | 0x7u << 29;
  return {static_cast<int>(bits >> 4 & 3),
          static_cast<int>(bits >> 7 & 7),
          static_cast<int>(bits >> 10 & 7),
          (bits >> 13 & 1) != 0,
          (bits >> 14 & 1) != 0,
          (bits >> 15 & 1) != 0,
          (bits >> 16 & 1) != 0,
          static_cast<int>(bits >> 24 & 31) * 16,
          static_cast<int>(bits >> 17 & 63) * 8,
          (bits & kOther) == 0};
}

// ---- Tensor memory: in which CTA of the pair, lane and column (from the operand's address on) a value is.

struct Place {
  int cta, lane, column;
};

constexpr Place place_of_result(int ctas, int m_total, int n_total, int m, int n) {
  if (ctas == 1) {
    return {0, m_total == 64 ? m / 16 * 32 + m % 16 : m, n};
  }
  if (m_total == 256) {
    return {m / 128, m % 128, n};
  }
  const int half = n_total / 2;
  return {m / 64, m % 64 + n / half * 64, n % half};
}

// A in tensor memory, for columns of the result from `n` on: lanes that hold these have the row, too.
constexpr Place place_of_a(int ctas, int m_total, int n_total, int m, int n, int k) {
  Place place = place_of_result(ctas, m_total, n_total, m, n);
  place.column = k / 2;
  return place;
}

// Shapes of tcgen05.ld and st: rows of lanes, and what register `r` of thread `t` of the warp is.
// k16x32x2 has its two halves next to each other, as CuTe's wrappers do.
enum class Shape { k32x32, k16x32x2, k16x64, k16x128, k16x256 };

constexpr int lanes_of(Shape shape) { return shape == Shape::k32x32 ? 32 : 16; }
constexpr int columns_of(Shape shape, int registers) { return shape == Shape::k32x32 ? registers : 2 * registers; }

constexpr Place place_of_register(Shape shape, int registers, int t, int r) {
  switch (shape) {
    case Shape::k32x32:
      return {0, t, r};
    case Shape::k16x32x2:
      return {0, t % 16, t / 16 * registers + r};
    case Shape::k16x64:
      return {0, t / 4 + t % 2 * 8, t / 2 % 2 + 2 * r};
    case Shape::k16x128:
      return {0, t / 4 + r % 2 * 8, t % 4 + r / 2 * 4};
    default:
      return {0, t / 4 + r / 2 % 2 * 8, r % 2 + t % 4 * 2 + r / 4 * 8};
  }
}

}  // namespace flash_mla::emulation
