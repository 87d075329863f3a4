// In place of csrc/sm90/kernels.cpp: sparse attention is done by the kernels of SM100, under emulation.
#define sparse_attention_kernels own_sparse_attention_kernels
#include "sm90/kernels.cpp"
#undef sparse_attention_kernels
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

}  // namespace

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels() { return kEmulated; }

}  // namespace flash_mla::sm90
