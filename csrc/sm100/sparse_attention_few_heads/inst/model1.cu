#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_model1(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kModel1, KVFormat::kNone, 512>("sm100_sparse_few_heads_model1", params, stream);
}
