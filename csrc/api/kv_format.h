// The names of KV-cache formats, as operators get them.
#pragma once

#include <string_view>
#include <utility>

#include "api/text.h"
#include "core/error.h"
#include "core/kv_format.h"

namespace flash_mla::api {

// The format of this name: those of flash_mla/kv_format.py.
inline KVFormat format_of(const char* argument, const Name& name) {
  constexpr std::pair<std::string_view, KVFormat> kNames[] = {
      {"V32", KVFormat::kV32},   {"MODEL1", KVFormat::kModel1},         {"V41", KVFormat::kV41},
      {"BF16", KVFormat::kBf16}, {"V32_NO_ROPE", KVFormat::kV32NoRope}, {"V41_FP4", KVFormat::kV41Fp4},
      {"V4", KVFormat::kModel1},
  };
  for (const auto& [known, format] : kNames) {
    if (known == name.view()) {
      return format;
    }
  }
  fail(ErrorKind::kValue, argument, " must be V32, V32_NO_ROPE, MODEL1, V4, V41, V41_FP4 or BF16, got ", name.view());
}

}  // namespace flash_mla::api
