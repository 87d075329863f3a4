#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_bf16_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kBf16, KVFormat::kNone, 576>("sm100_sparse_paired_bf16_576", params, stream);
}
