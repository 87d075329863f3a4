#include "sm90/sparse_attention_bf16_few_heads/launch.cuh"
#include "sm90/sparse_attention_bf16_few_heads/launch.h"

void flash_mla::sm90::sparse_attention_bf16_few_heads::launch_576(const SparseAttentionParams& params, void* stream) {
  launch<576>("sm90_sparse_few_heads_bf16_576", params, stream);
}
