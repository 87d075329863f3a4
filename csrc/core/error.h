// One error path for host code. A message starts with the class that Python raises for it, in square brackets behind
// the library's name.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace flash_mla {

enum class ErrorKind { kValue, kType, kUnsupported, kCuda };

inline const char* python_class(ErrorKind kind) {
  switch (kind) {
    case ErrorKind::kValue:
      return "ValueError";
    case ErrorKind::kType:
      return "TypeError";
    case ErrorKind::kUnsupported:
      return "UnsupportedError";
    case ErrorKind::kCuda:
      break;
  }
  return "CudaError";
}

template <class... Parts>
std::string cat(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class... Parts>
[[noreturn]] void fail(ErrorKind kind, const Parts&... parts) {
  throw std::runtime_error(cat("flash_mla[", python_class(kind), "] ", parts...));
}

// The cold part stays out of line: a passing check costs one branch.
template <class... Parts>
inline void check(bool ok, ErrorKind kind, const Parts&... parts) {
  if (!ok) [[unlikely]] {
    fail(kind, parts...);
  }
}

}  // namespace flash_mla
