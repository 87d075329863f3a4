#include "sm90/sparse_attention_paired/launch.cuh"
#include "sm90/sparse_attention_paired/launch.h"

void flash_mla::sm90::sparse_attention_paired::launch_bf16_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kBf16, KVFormat::kNone, 576>("sm90_sparse_paired_bf16_576", params, stream);
}
