// A run-time value becomes a compile-time constant: dispatch<512, 576>(d_qk, "d_qk", [&](auto D) { launch<D()>(...);
// });
#pragma once

#include <type_traits>

#include "core/error.h"

namespace flash_mla {

template <int... kValues, class Function>
void dispatch(int value, const char* name, Function&& function) {
  const bool found = ((value == kValues ? (function(std::integral_constant<int, kValues>{}), true) : false) || ...);
  check(found, ErrorKind::kUnsupported, name, " = ", value, " is not one of the values that this kernel was built for");
}

}  // namespace flash_mla
