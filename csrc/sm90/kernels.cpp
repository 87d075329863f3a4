#include "sm90/kernels.h"

#include "core/sparse_support.h"
#include "sm90/dense_decode/launch.h"
#include "sm90/dense_prefill/launch.h"
#include "sm90/dense_prefill_backward/launch.h"
#include "sm90/sparse_attention/launch.h"
#include "sm90/sparse_attention_bf16/launch.h"
#include "sm90/sparse_attention_few_heads/launch.h"
#include "sm90/sparse_attention_paired/launch.h"
#include "sm90/sparse_prefill_backward/launch.h"

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

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_sparse_attention(const SparseAttentionProblem& problem) {
  return problem.compute_capability != 90 ? "runs on compute capability 9.0 only"
                                          : why_not_formats<kFormat, kHeadDim, kExtra>(problem);
}

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_few_heads(const SparseAttentionProblem& problem) {
  const char* reason = why_not_few_rows(problem);
  return reason ? reason : why_not_sparse_attention<kFormat, kHeadDim, kExtra>(problem);
}

template <KVFormat kFormat, int kHeadDim, KVFormat kExtra = kFormat>
const char* why_not_paired(const SparseAttentionProblem& problem) {
  const char* reason = why_not_many_rows(problem);
  if (reason == nullptr && problem.few_tiles) {
    // Measured: to set up clusters takes longer than sharing keys saves.
    reason = "a call of so few query rows is for CTAs by themselves";
  }
  return reason ? reason : why_not_sparse_attention<kFormat, kHeadDim, kExtra>(problem);
}

constexpr Kernel<SparseAttentionProblem, SparseAttentionParams> kSparseAttention[] = {
    {"sm90_sparse_few_heads_v32", why_not_few_heads<KVFormat::kV32, 576>, sparse_attention_few_heads::launch_v32, true,
     Partials::kFloat},
    {"sm90_sparse_few_heads_model1", why_not_few_heads<KVFormat::kModel1, 512>,
     sparse_attention_few_heads::launch_model1, true, Partials::kFloat},
    {"sm90_sparse_few_heads_v41", why_not_few_heads<KVFormat::kV41, 512>, sparse_attention_few_heads::launch_v41, true,
     Partials::kFloat},
    {"sm90_sparse_few_heads_v41_fp4", why_not_few_heads<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention_few_heads::launch_v41_fp4, true, Partials::kFloat},
    {"sm90_sparse_few_heads_v32_no_rope", why_not_few_heads<KVFormat::kV32NoRope, 512>,
     sparse_attention_few_heads::launch_v32_no_rope, true, Partials::kFloat},
    {"sm90_sparse_few_heads_e4m3_576", why_not_few_heads<KVFormat::kE4m3, 576>,
     sparse_attention_few_heads::launch_e4m3_576, false, Partials::kFloat},
    {"sm90_sparse_few_heads_e4m3_512", why_not_few_heads<KVFormat::kE4m3NoRope, 512>,
     sparse_attention_few_heads::launch_e4m3_512, false, Partials::kFloat},
    {"sm90_sparse_few_heads_bf16_576", why_not_few_heads<KVFormat::kBf16, 576>,
     sparse_attention_few_heads::launch_bf16_576, true, Partials::kFloat},
    {"sm90_sparse_few_heads_bf16_512", why_not_few_heads<KVFormat::kBf16, 512>,
     sparse_attention_few_heads::launch_bf16_512, true, Partials::kFloat},
    {"sm90_sparse_paired_v32", why_not_paired<KVFormat::kV32, 576>, sparse_attention_paired::launch_v32, true},
    {"sm90_sparse_paired_model1", why_not_paired<KVFormat::kModel1, 512>, sparse_attention_paired::launch_model1, true},
    {"sm90_sparse_paired_v41", why_not_paired<KVFormat::kV41, 512>, sparse_attention_paired::launch_v41, true},
    {"sm90_sparse_paired_v41_fp4", why_not_paired<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention_paired::launch_v41_fp4, true},
    {"sm90_sparse_paired_v32_no_rope", why_not_paired<KVFormat::kV32NoRope, 512>,
     sparse_attention_paired::launch_v32_no_rope, true},
    {"sm90_sparse_attention_v32", why_not_sparse_attention<KVFormat::kV32, 576>, sparse_attention::launch_v32, true},
    {"sm90_sparse_attention_model1", why_not_sparse_attention<KVFormat::kModel1, 512>, sparse_attention::launch_model1,
     true},
    {"sm90_sparse_attention_v41", why_not_sparse_attention<KVFormat::kV41, 512>, sparse_attention::launch_v41, true},
    {"sm90_sparse_attention_v41_fp4", why_not_sparse_attention<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sparse_attention::launch_v41_fp4, true},
    {"sm90_sparse_attention_v32_no_rope", why_not_sparse_attention<KVFormat::kV32NoRope, 512>,
     sparse_attention::launch_v32_no_rope, true},
    {"sm90_sparse_attention_e4m3_576", why_not_sparse_attention<KVFormat::kE4m3, 576>,
     sparse_attention::launch_e4m3_576},
    {"sm90_sparse_attention_e4m3_512", why_not_sparse_attention<KVFormat::kE4m3NoRope, 512>,
     sparse_attention::launch_e4m3_512},
    {"sm90_sparse_attention_bf16_576", why_not_sparse_attention<KVFormat::kBf16, 576>,
     sparse_attention_bf16::launch_576},
    {"sm90_sparse_attention_bf16_512", why_not_sparse_attention<KVFormat::kBf16, 512>,
     sparse_attention_bf16::launch_512},
};

template <int kHeadDim>
const char* why_not_sparse_prefill_backward(const SparseAttentionProblem& problem) {
  if (problem.extra_format != KVFormat::kNone) {
    return "there must be no extra_k_cache";
  }
  return why_not_sparse_attention<KVFormat::kBf16, kHeadDim>(problem);
}

constexpr Kernel<SparseAttentionProblem, SparsePrefillBackwardParams> kSparsePrefillBackward[] = {
    {"sm90_sparse_prefill_backward_576", why_not_sparse_prefill_backward<576>, sparse_prefill_backward::launch_576},
    {"sm90_sparse_prefill_backward_512", why_not_sparse_prefill_backward<512>, sparse_prefill_backward::launch_512},
};

template <Element kElement, int kHeadDim>
const char* why_not_dense_prefill(const DensePrefillProblem& problem) {
  if (problem.compute_capability != 90) {
    return "runs on compute capability 9.0 only";
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
  if (!(problem.softmax_scale >= 0)) {
    return "softmax_scale must not be negative";
  }
  return nullptr;
}

constexpr Kernel<DensePrefillProblem, DensePrefillParams> kDensePrefill[] = {
    {"sm90_dense_prefill_bf16_192", why_not_dense_prefill<Element::kBFloat16, 192>, dense_prefill::launch_bf16_192},
    {"sm90_dense_prefill_bf16_128", why_not_dense_prefill<Element::kBFloat16, 128>, dense_prefill::launch_bf16_128},
    {"sm90_dense_prefill_fp16_192", why_not_dense_prefill<Element::kFloat16, 192>, dense_prefill::launch_fp16_192},
    {"sm90_dense_prefill_fp16_128", why_not_dense_prefill<Element::kFloat16, 128>, dense_prefill::launch_fp16_128},
};

constexpr Kernel<DensePrefillProblem, DensePrefillBackwardParams> kDensePrefillBackward[] = {
    {"sm90_dense_prefill_backward_bf16_192", why_not_dense_prefill<Element::kBFloat16, 192>,
     dense_prefill_backward::launch_bf16_192},
    {"sm90_dense_prefill_backward_bf16_128", why_not_dense_prefill<Element::kBFloat16, 128>,
     dense_prefill_backward::launch_bf16_128},
    {"sm90_dense_prefill_backward_fp16_192", why_not_dense_prefill<Element::kFloat16, 192>,
     dense_prefill_backward::launch_fp16_192},
    {"sm90_dense_prefill_backward_fp16_128", why_not_dense_prefill<Element::kFloat16, 128>,
     dense_prefill_backward::launch_fp16_128},
};

}  // namespace

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels() { return kDenseDecode; }

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels() {
  return kSparseAttention;
}

std::span<const Kernel<SparseAttentionProblem, SparsePrefillBackwardParams>> sparse_prefill_backward_kernels() {
  return kSparsePrefillBackward;
}

std::span<const Kernel<DensePrefillProblem, DensePrefillParams>> dense_prefill_kernels() { return kDensePrefill; }

std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels() {
  return kDensePrefillBackward;
}

}  // namespace flash_mla::sm90
