#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_e4m3_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kE4m3, KVFormat::kNone, 576>("sm100_sparse_few_heads_e4m3_576", params, stream);
}
