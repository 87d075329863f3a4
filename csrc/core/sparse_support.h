// What kernels of sparse attention say of a problem, whatever their architecture.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla {

constexpr const char* format_reason(KVFormat format) {
  switch (format) {
    case KVFormat::kBf16:
      return "k_cache must be bfloat16";
    case KVFormat::kV32:
      return "k_cache must be of format V32";
    case KVFormat::kV32NoRope:
      return "k_cache must be of format V32_NO_ROPE";
    case KVFormat::kModel1:
      return "k_cache must be of format MODEL1";
    case KVFormat::kE4m3:
    case KVFormat::kE4m3NoRope:
      return "k_cache must be of e4m3 values with one scale, by block table";
    default:
      return "k_cache must be of format V41";
  }
}

// Null where a kernel for these formats takes the problem, on the device that it is for. `kExtra`: what a second cache
// must be, if there is one; for V41_FP4 there must.
template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_formats(const SparseAttentionProblem& problem) {
  if (problem.element != Element::kBFloat16) {
    return "q must be bfloat16";
  }
  if (problem.h_kv != 1) {
    return "h_kv must be 1";
  }
  if (problem.format != kFormat) {
    return format_reason(kFormat);
  }
  if (problem.d_qk != kHeadDim) {
    return kHeadDim == 576 ? "d_qk must be 576" : "d_qk must be 512";
  }
  if (problem.extra_format != kExtra && (problem.extra_format != KVFormat::kNone || kExtra != kFormat)) {
    return kExtra == kFormat ? "extra_k_cache must be of the same format as k_cache"
                             : "extra_k_cache must be of format V41_FP4";
  }
  if (problem.d_v != kHeadDimV) {
    return "head_dim_v must be 512";
  }
  if (!(problem.softmax_scale >= 0)) {
    return "softmax_scale must not be negative";
  }
  return nullptr;
}

// Query rows that share a list of keys.
inline int64_t unit_rows(const SparseAttentionProblem& problem) {
  return static_cast<int64_t>(problem.from_table ? problem.s_q : 1) * problem.h_q;
}

constexpr int kMostFewRows = 32;

// Null where the kernels for few heads take as many query rows as share a list.
inline const char* why_not_few_rows(const SparseAttentionProblem& problem) {
  static_assert(kMostFewRows == 32);
  if (unit_rows(problem) <= kMostFewRows) {
    return nullptr;
  }
  return problem.from_table ? "s_q * h_q must be at most 32" : "h_q must be at most 32";
}

// Null where more query rows share a list than a row tile has: what pairs of CTAs are for.
inline const char* why_not_many_rows(const SparseAttentionProblem& problem) {
  static_assert(kRowTile == 64);
  if (unit_rows(problem) > kRowTile) {
    return nullptr;
  }
  return problem.from_table ? "s_q * h_q must be more than 64" : "h_q must be more than 64";
}

}  // namespace flash_mla
