#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

namespace flash_mla::sm100::sparse_attention_paired {

void launch_bf16_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kBf16, KVFormat::kNone, 576>("sm100_sparse_paired_bf16_576", params, stream);
}

void launch_dense_bf16_576(const DenseDecodeParams& params, void* stream) {
  launch_dense<__nv_bfloat16, 576>("sm100_dense_decode_paired_bf16_576", params, stream);
}

}  // namespace flash_mla::sm100::sparse_attention_paired
