// The str arguments of operators.
#pragma once

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <string_view>

namespace flash_mla::api {

// A short name, kept in place: the names that operators know fit, and a longer one, cut short, is none of them.
// (torch's own conversion to std::string never frees the string that it makes on the way.)
struct Name {
  char data[15];
  unsigned char size;

  std::string_view view() const { return {data, size}; }
};

}  // namespace flash_mla::api

template <>
struct torch::stable::detail::ToImpl<flash_mla::api::Name> {
  static flash_mla::api::Name call(StableIValue value, uint64_t, bool) {
    const auto handle = torch::stable::detail::to<StringHandle>(value);
    size_t size = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &size));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
    flash_mla::api::Name name{};
    name.size = static_cast<unsigned char>(std::min(size, sizeof(name.data)));
    std::memcpy(name.data, data, name.size);
    STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
    return name;
  }
};
