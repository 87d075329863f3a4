// A kernel table lists the kernels of one op in order of preference. It is the only place that says what a kernel can
// do: dispatch, error texts, Python's `why_not` and the README's support matrix all read it.
#pragma once

#include <span>
#include <string>

#include "core/error.h"

namespace flash_mla {

// What partial results are in (core/params/dense_decode.h).
enum class Partials { kHalf, kFloat };

template <class Problem, class Params>
struct Kernel {
  const char* name;
  // Null when the kernel takes the problem, else the reason in words.
  const char* (*why_not)(const Problem&);
  void (*launch)(const Params&, void* stream);
  // Starts on calls that no plan cuts before the kernels before it have ended.
  bool starts_early = false;
  Partials partials = Partials::kHalf;  // that it writes
};

// "name\treason\n" for every kernel; the reason is empty where the kernel takes the problem.
template <class Problem, class Params>
std::string explain(std::span<const Kernel<Problem, Params>> table, const Problem& problem) {
  std::string text;
  for (const auto& kernel : table) {
    const char* reason = kernel.why_not(problem);
    text += cat(kernel.name, "\t", reason ? reason : "", "\n");
  }
  return text;
}

template <class Problem, class Params>
const Kernel<Problem, Params>& select(const char* op, std::span<const Kernel<Problem, Params>> table,
                                      const Problem& problem) {
  for (const auto& kernel : table) {
    if (kernel.why_not(problem) == nullptr) {
      return kernel;
    }
  }
  std::string reasons;
  for (const auto& kernel : table) {
    reasons += cat("; ", kernel.name, ": ", kernel.why_not(problem));
  }
  fail(ErrorKind::kUnsupported, op, ": no kernel of this build takes the problem", reasons);
}

}  // namespace flash_mla
