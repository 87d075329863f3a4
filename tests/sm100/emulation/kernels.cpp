// In place of csrc/sm90/kernels.cpp: sparse attention, and the backward of dense prefill, are done by the kernels of
// SM100, under emulation.
#define sparse_attention_kernels own_sparse_attention_kernels
#define dense_prefill_backward_kernels own_dense_prefill_backward_kernels
#include "sm90/kernels.cpp"
#undef sparse_attention_kernels
#undef dense_prefill_backward_kernels
#include "sm100/dense_prefill_backward/launch.h"
#include "sm100/sparse_attention/launch.h"

namespace flash_mla::sm90 {
namespace {

constexpr Kernel<SparseAttentionProblem, SparseAttentionParams> kEmulated[] = {
    {"sm100_sparse_attention_v32", why_not_sparse_attention<KVFormat::kV32, 576>, sm100::sparse_attention::launch_v32},
    {"sm100_sparse_attention_model1", why_not_sparse_attention<KVFormat::kModel1, 512>,
     sm100::sparse_attention::launch_model1},
    {"sm100_sparse_attention_v41", why_not_sparse_attention<KVFormat::kV41, 512>, sm100::sparse_attention::launch_v41},
    {"sm100_sparse_attention_v41_fp4", why_not_sparse_attention<KVFormat::kV41, 512, KVFormat::kV41Fp4>,
     sm100::sparse_attention::launch_v41_fp4},
    {"sm100_sparse_attention_v32_no_rope", why_not_sparse_attention<KVFormat::kV32NoRope, 512>,
     sm100::sparse_attention::launch_v32_no_rope},
};

// As in csrc/sm100/kernels.cpp.
template <Element kElement, int kHeadDim>
const char* why_not_emulated_backward(const DensePrefillProblem& problem) {
  return problem.softmax_scale > 0 ? why_not_dense_prefill<kElement, kHeadDim>(problem)
                                   : "softmax_scale must be positive";
}

constexpr Kernel<DensePrefillProblem, DensePrefillBackwardParams> kEmulatedBackward[] = {
    {"sm100_dense_prefill_backward_bf16_192", why_not_emulated_backward<Element::kBFloat16, 192>,
     sm100::dense_prefill_backward::launch_bf16_192},
    {"sm100_dense_prefill_backward_bf16_128", why_not_emulated_backward<Element::kBFloat16, 128>,
     sm100::dense_prefill_backward::launch_bf16_128},
    {"sm100_dense_prefill_backward_fp16_192", why_not_emulated_backward<Element::kFloat16, 192>,
     sm100::dense_prefill_backward::launch_fp16_192},
    {"sm100_dense_prefill_backward_fp16_128", why_not_emulated_backward<Element::kFloat16, 128>,
     sm100::dense_prefill_backward::launch_fp16_128},
};

}  // namespace

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels() { return kEmulated; }

std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels() {
  return kEmulatedBackward;
}

}  // namespace flash_mla::sm90
