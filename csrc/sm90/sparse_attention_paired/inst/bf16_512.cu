#include "sm90/sparse_attention_paired/launch.cuh"
#include "sm90/sparse_attention_paired/launch.h"

void flash_mla::sm90::sparse_attention_paired::launch_bf16_512(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kBf16, KVFormat::kNone, 512>("sm90_sparse_paired_bf16_512", params, stream);
}
