#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_v32(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV32, KVFormat::kNone, 576>("sm100_sparse_few_heads_v32", params, stream);
}
