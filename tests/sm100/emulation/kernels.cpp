// In place of csrc/sm90/kernels.cpp: the backward of dense prefill is done by the kernels of SM100, under emulation;
// its forward is SM90's.
#define dense_prefill_backward_kernels own_dense_prefill_backward_kernels
#include "sm90/kernels.cpp"
#undef dense_prefill_backward_kernels
#include "sm100/dense_prefill_backward/launch.h"

namespace flash_mla::sm90 {
namespace {

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

std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels() {
  return kEmulatedBackward;
}

}  // namespace flash_mla::sm90
