#include "sm90/sparse_attention_bf16/launch.cuh"
#include "sm90/sparse_attention_bf16/launch.h"

void flash_mla::sm90::sparse_attention_bf16::launch_576(const SparseAttentionParams& params, void* stream) {
  launch<576>("sm90_sparse_attention_bf16_576", params, stream);
}
