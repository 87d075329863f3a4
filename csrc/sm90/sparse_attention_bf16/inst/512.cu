#include "sm90/sparse_attention_bf16/launch.cuh"
#include "sm90/sparse_attention_bf16/launch.h"

void flash_mla::sm90::sparse_attention_bf16::launch_512(const SparseAttentionParams& params, void* stream) {
  launch<512>("sm90_sparse_attention_bf16_512", params, stream);
}
