// The formats of KV caches, and their byte layout, once. Semantics: flash_mla/kv_format.py.
#pragma once

#include <cstdint>

namespace flash_mla {

// kE4m3 and kE4m3NoRope are e4m3 values with one scale for the whole cache, d_qk 576 and 512: for block tables only.
enum class KVFormat : int { kBf16 = 0, kV32, kV32NoRope, kModel1, kV41, kV41Fp4, kE4m3, kE4m3NoRope, kNone };

constexpr bool has_one_scale(KVFormat format) { return format == KVFormat::kE4m3 || format == KVFormat::kE4m3NoRope; }

enum class ScaleType { kFloat32, kUe8m0, kE4m3, kNone };

// Where the bytes of a row are: `values` quantised values first, then their scales, then `d_qk - values` bfloat16
// values (RoPE; kE4m3: e4m3 values too). MODEL1 keeps the scales of a page behind all its rows.
struct KVLayout {
  int d_qk;
  int values;      // quantised values of a row
  int value_bits;  // 8: e4m3; 4: e2m1, the value of even index in the low half of a byte
  int group;       // quantised values per scale
  ScaleType scale;
  int row_bytes;  // of a token, scales included: the size of the cache's last dimension
  bool scales_behind_page;

  constexpr int value_bytes() const { return values * value_bits / 8; }
  constexpr int rope() const { return d_qk - values; }
  constexpr int num_scales() const { return values / group; }
  constexpr int scale_bytes() const {
    return scale == ScaleType::kNone ? 0 : num_scales() * (scale == ScaleType::kFloat32 ? 4 : 1);
  }
  // From one row's values to the next one's, where rows are laid out by the format itself.
  constexpr int row_stride() const { return scales_behind_page ? value_bytes() + 2 * rope() : row_bytes; }
  // From a row's first byte to its RoPE values.
  constexpr int rope_offset() const { return value_bytes() + (scales_behind_page ? 0 : scale_bytes()); }
  // MODEL1: from one row's scales to the next one's, which begin behind `page` rows.
  constexpr int scale_stride() const { return row_bytes - row_stride(); }
};

constexpr KVLayout layout_of(KVFormat format) {
  switch (format) {
    case KVFormat::kV32:
      return {576, 512, 8, 128, ScaleType::kFloat32, 656, false};
    case KVFormat::kV32NoRope:
      return {512, 512, 8, 128, ScaleType::kFloat32, 528, false};
    case KVFormat::kModel1:
      return {512, 448, 8, 64, ScaleType::kUe8m0, 584, true};
    case KVFormat::kV41:
      return {512, 512, 8, 32, ScaleType::kUe8m0, 528, false};
    case KVFormat::kV41Fp4:
      return {512, 512, 4, 16, ScaleType::kE4m3, 288, false};
    case KVFormat::kE4m3:
      return {576, 512, 8, 512, ScaleType::kNone, 576, false};
    case KVFormat::kE4m3NoRope:
      return {512, 512, 8, 512, ScaleType::kNone, 512, false};
    default:
      return {};
  }
}

}  // namespace flash_mla
