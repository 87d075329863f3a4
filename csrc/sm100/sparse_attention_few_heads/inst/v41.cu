#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_v41(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV41, KVFormat::kNone, 512>("sm100_sparse_few_heads_v41", params, stream);
}
