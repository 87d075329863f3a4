#include "sm90/kernels.h"

#include "sm90/dense_decode/launch.h"

namespace flash_mla::sm90 {
namespace {

template <Element kElement, int kHeadDim>
const char* why_not_dense_decode(const DenseDecodeProblem& problem) {
  if (problem.compute_capability != 90) {
    return "runs on compute capability 9.0 only";
  }
  if (problem.element != kElement) {
    return kElement == Element::kBFloat16 ? "q and k_cache must be bfloat16" : "q and k_cache must be float16";
  }
  if (problem.d_qk != kHeadDim) {
    return kHeadDim == 576 ? "d_qk must be 576" : "d_qk must be 512";
  }
  if (problem.d_v != kHeadDimV) {
    return "head_dim_v must be 512";
  }
  if (!(problem.softmax_scale >= 0)) {
    return "softmax_scale must not be negative";
  }
  return nullptr;
}

constexpr Kernel<DenseDecodeProblem, DenseDecodeParams> kDenseDecode[] = {
    {"sm90_dense_decode_bf16_576", why_not_dense_decode<Element::kBFloat16, 576>, dense_decode::launch_bf16_576},
    {"sm90_dense_decode_bf16_512", why_not_dense_decode<Element::kBFloat16, 512>, dense_decode::launch_bf16_512},
    {"sm90_dense_decode_fp16_576", why_not_dense_decode<Element::kFloat16, 576>, dense_decode::launch_fp16_576},
    {"sm90_dense_decode_fp16_512", why_not_dense_decode<Element::kFloat16, 512>, dense_decode::launch_fp16_512},
};

}  // namespace

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels() { return kDenseDecode; }

}  // namespace flash_mla::sm90
