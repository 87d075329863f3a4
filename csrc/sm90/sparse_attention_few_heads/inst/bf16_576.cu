#include "sm90/sparse_attention_few_heads/launch.cuh"
#include "sm90/sparse_attention_few_heads/launch.h"

void flash_mla::sm90::sparse_attention_few_heads::launch_bf16_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kBf16, KVFormat::kNone, 576>("sm90_sparse_few_heads_bf16_576", params, stream);
}
