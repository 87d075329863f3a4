#include "sm100/kernels.h"

#include "core/sparse_support.h"
#include "sm100/dense_prefill/launch.h"
#include "sm100/dense_prefill_backward/launch.h"
#include "sm100/sparse_attention/launch.h"
#include "sm100/sparse_attention_few_heads/launch.h"
#include "sm100/sparse_attention_paired/launch.h"

namespace flash_mla::sm100 {
namespace {

// Code for sm_100f runs on these. The reason says what a user of such a GPU should know of the kernels, too.
constexpr const char* why_not_device(int compute_capability) {
  return compute_capability == 100 || compute_capability == 103
             ? nullptr
             : "runs on compute capability 10.0 and 10.3 only, and has not been run on Blackwell hardware";
}

template <Element kElement, int kHeadDim>
const char* why_not_dense_decode(const DenseDecodeProblem& problem) {
  if (const char* reason = why_not_device(problem.compute_capability)) {
    return reason;
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

template <Element kElement, int kHeadDim>
const char* why_not_dense_few_heads(const DenseDecodeProblem& problem) {
  if (int64_t{problem.s_q} * problem.h_q > int64_t{kMostFewRows} * problem.h_kv) {
    return "s_q * h_q must be at most 32 for each key head";
  }
  return why_not_dense_decode<kElement, kHeadDim>(problem);
}

template <Element kElement, int kHeadDim>
const char* why_not_dense_paired(const DenseDecodeProblem& problem) {
  static_assert(kRowTile == 64);
  if (int64_t{problem.s_q} * problem.h_q <= int64_t{kRowTile} * problem.h_kv) {
    return "s_q * h_q must be more than 64 for each key head";
  }
  return why_not_dense_decode<kElement, kHeadDim>(problem);
}

constexpr Kernel<DenseDecodeProblem, DenseDecodeParams> kDenseDecode[] = {
    {"sm100_dense_decode_few_heads_bf16_576", why_not_dense_few_heads<Element::kBFloat16, 576>,
     sparse_attention_few_heads::launch_dense_bf16_576, false, Partials::kFloat},
    {"sm100_dense_decode_few_heads_bf16_512", why_not_dense_few_heads<Element::kBFloat16, 512>,
     sparse_attention_few_heads::launch_dense_bf16_512, false, Partials::kFloat},
    {"sm100_dense_decode_few_heads_fp16_576", why_not_dense_few_heads<Element::kFloat16, 576>,
     sparse_attention_few_heads::launch_dense_fp16_576, false, Partials::kFloat},
    {"sm100_dense_decode_few_heads_fp16_512", why_not_dense_few_heads<Element::kFloat16, 512>,
     sparse_attention_few_heads::launch_dense_fp16_512, false, Partials::kFloat},
    {"sm100_dense_decode_paired_bf16_576", why_not_dense_paired<Element::kBFloat16, 576>,
     sparse_attention_paired::launch_dense_bf16_576},
    {"sm100_dense_decode_paired_bf16_512", why_not_dense_paired<Element::kBFloat16, 512>,
     sparse_attention_paired::launch_dense_bf16_512},
    {"sm100_dense_decode_paired_fp16_576", why_not_dense_paired<Element::kFloat16, 576>,
     sparse_attention_paired::launch_dense_fp16_576},
    {"sm100_dense_decode_paired_fp16_512", why_not_dense_paired<Element::kFloat16, 512>,
     sparse_attention_paired::launch_dense_fp16_512},
    {"sm100_dense_decode_bf16_576", why_not_dense_decode<Element::kBFloat16, 576>,
     sparse_attention::launch_dense_bf16_576},
    {"sm100_dense_decode_bf16_512", why_not_dense_decode<Element::kBFloat16, 512>,
     sparse_attention::launch_dense_bf16_512},
    {"sm100_dense_decode_fp16_576", why_not_dense_decode<Element::kFloat16, 576>,
     sparse_attention::launch_dense_fp16_576},
    {"sm100_dense_decode_fp16_512", why_not_dense_decode<Element::kFloat16, 512>,
     sparse_attention::launch_dense_fp16_512},
};

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_sparse_attention(const SparseAttentionProblem& problem) {
  const char* reason = why_not_device(problem.compute_capability);
  return reason ? reason : why_not_formats<kFormat, kHeadDim, kExtra>(problem);
}

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_few_heads(const SparseAttentionProblem& problem) {
  const char* reason = why_not_few_rows(problem);
  return reason ? reason : why_not_sparse_attention<kFormat, kHeadDim, kExtra>(problem);
}

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_paired(const SparseAttentionProblem& problem) {
  const char* reason = why_not_many_rows(problem);
  return reason ? reason : why_not_sparse_attention<kFormat, kHeadDim, kExtra>(problem);
}

constexpr Kernel<SparseAttentionProblem, SparseAttentionParams> kSparseAttention[] = {
    {"sm100_sparse_few_heads_v32", why_not_few_heads<KVFormat::kV32, 576>, sparse_attention_few_heads::launch_v32,
     false, Partials::kFloat},
    {"sm100_sparse_few_heads_model1", why_not_few_heads<KVFormat::kModel1, 512>,
     sparse_attention_few_heads::launch_model1, false, Partials::kFloat},
    {"sm100_sparse_few_heads_v41", why_not_few_heads<KVFormat::kV41, 512>, sparse_attention_few_heads::launch_v41,
     false, Partials::kFloat},
    {"sm100_sparse_few_heads_v41_fp4", why_not_few_heads<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention_few_heads::launch_v41_fp4, false, Partials::kFloat},
    {"sm100_sparse_few_heads_v32_no_rope", why_not_few_heads<KVFormat::kV32NoRope, 512>,
     sparse_attention_few_heads::launch_v32_no_rope, false, Partials::kFloat},
    {"sm100_sparse_few_heads_e4m3_576", why_not_few_heads<KVFormat::kE4m3, 576>,
     sparse_attention_few_heads::launch_e4m3_576, false, Partials::kFloat},
    {"sm100_sparse_few_heads_e4m3_512", why_not_few_heads<KVFormat::kE4m3NoRope, 512>,
     sparse_attention_few_heads::launch_e4m3_512, false, Partials::kFloat},
    {"sm100_sparse_few_heads_bf16_576", why_not_few_heads<KVFormat::kBf16, 576>,
     sparse_attention_few_heads::launch_bf16_576, false, Partials::kFloat},
    {"sm100_sparse_few_heads_bf16_512", why_not_few_heads<KVFormat::kBf16, 512>,
     sparse_attention_few_heads::launch_bf16_512, false, Partials::kFloat},
    {"sm100_sparse_paired_v32", why_not_paired<KVFormat::kV32, 576>, sparse_attention_paired::launch_v32},
    {"sm100_sparse_paired_model1", why_not_paired<KVFormat::kModel1, 512>, sparse_attention_paired::launch_model1},
    {"sm100_sparse_paired_v41", why_not_paired<KVFormat::kV41, 512>, sparse_attention_paired::launch_v41},
    {"sm100_sparse_paired_v41_fp4", why_not_paired<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention_paired::launch_v41_fp4},
    {"sm100_sparse_paired_v32_no_rope", why_not_paired<KVFormat::kV32NoRope, 512>,
     sparse_attention_paired::launch_v32_no_rope},
    {"sm100_sparse_paired_bf16_576", why_not_paired<KVFormat::kBf16, 576>, sparse_attention_paired::launch_bf16_576},
    {"sm100_sparse_paired_bf16_512", why_not_paired<KVFormat::kBf16, 512>, sparse_attention_paired::launch_bf16_512},
    {"sm100_sparse_attention_v32", why_not_sparse_attention<KVFormat::kV32, 576>, sparse_attention::launch_v32},
    {"sm100_sparse_attention_model1", why_not_sparse_attention<KVFormat::kModel1, 512>,
     sparse_attention::launch_model1},
    {"sm100_sparse_attention_v41", why_not_sparse_attention<KVFormat::kV41, 512>, sparse_attention::launch_v41},
    {"sm100_sparse_attention_v41_fp4", why_not_sparse_attention<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention::launch_v41_fp4},
    {"sm100_sparse_attention_v32_no_rope", why_not_sparse_attention<KVFormat::kV32NoRope, 512>,
     sparse_attention::launch_v32_no_rope},
    {"sm100_sparse_attention_e4m3_576", why_not_sparse_attention<KVFormat::kE4m3, 576>,
     sparse_attention::launch_e4m3_576},
    {"sm100_sparse_attention_e4m3_512", why_not_sparse_attention<KVFormat::kE4m3NoRope, 512>,
     sparse_attention::launch_e4m3_512},
    {"sm100_sparse_attention_bf16_576", why_not_sparse_attention<KVFormat::kBf16, 576>,
     sparse_attention::launch_bf16_576},
    {"sm100_sparse_attention_bf16_512", why_not_sparse_attention<KVFormat::kBf16, 512>,
     sparse_attention::launch_bf16_512},
};

template <Element kElement, int kHeadDim>
const char* why_not_dense_prefill(const DensePrefillProblem& problem) {
  if (const char* reason = why_not_device(problem.compute_capability)) {
    return reason;
  }
  if (problem.element != kElement) {
    return kElement == Element::kBFloat16 ? "q, k and v must be bfloat16" : "q, k and v must be float16";
  }
  if (problem.d_qk != kHeadDim) {
    return kHeadDim == 192 ? "d_qk must be 192" : "d_qk must be 128";
  }
  if (problem.d_v != kPrefillHeadDimV) {
    return "d_v must be 128";
  }
  // With a scale of 0 a masked score, minus infinity, would turn into NaN.
  if (!(problem.softmax_scale > 0)) {
    return "softmax_scale must be positive";
  }
  return nullptr;
}

template <Element kElement, int kHeadDim>
const char* why_not_dense_prefill_backward(const DensePrefillProblem& problem) {
  // CUTLASS counts the elements of a tile of dk and dv in 32 bits.
  static_assert(int64_t{65536} * kHeadDim * kBackwardKeyTile <= INT32_MAX);
  if (problem.h_kv > 65536) {
    return "h_kv must be at most 65536";
  }
  return why_not_dense_prefill<kElement, kHeadDim>(problem);
}

constexpr Kernel<DensePrefillProblem, DensePrefillParams> kDensePrefill[] = {
    {"sm100_dense_prefill_bf16_192", why_not_dense_prefill<Element::kBFloat16, 192>, dense_prefill::launch_bf16_192},
    {"sm100_dense_prefill_bf16_128", why_not_dense_prefill<Element::kBFloat16, 128>, dense_prefill::launch_bf16_128},
    {"sm100_dense_prefill_fp16_192", why_not_dense_prefill<Element::kFloat16, 192>, dense_prefill::launch_fp16_192},
    {"sm100_dense_prefill_fp16_128", why_not_dense_prefill<Element::kFloat16, 128>, dense_prefill::launch_fp16_128},
};

constexpr Kernel<DensePrefillProblem, DensePrefillBackwardParams> kDensePrefillBackward[] = {
    {"sm100_dense_prefill_backward_bf16_192", why_not_dense_prefill_backward<Element::kBFloat16, 192>,
     dense_prefill_backward::launch_bf16_192},
    {"sm100_dense_prefill_backward_bf16_128", why_not_dense_prefill_backward<Element::kBFloat16, 128>,
     dense_prefill_backward::launch_bf16_128},
    {"sm100_dense_prefill_backward_fp16_192", why_not_dense_prefill_backward<Element::kFloat16, 192>,
     dense_prefill_backward::launch_fp16_192},
    {"sm100_dense_prefill_backward_fp16_128", why_not_dense_prefill_backward<Element::kFloat16, 128>,
     dense_prefill_backward::launch_fp16_128},
};

}  // namespace

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels() { return kDenseDecode; }

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels() {
  return kSparseAttention;
}

std::span<const Kernel<DensePrefillProblem, DensePrefillParams>> dense_prefill_kernels() { return kDensePrefill; }

std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels() {
  return kDensePrefillBackward;
}

}  // namespace flash_mla::sm100
