#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_v41_fp4(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV41, KVFormat::kV41Fp4, 512>("sm100_sparse_few_heads_v41_fp4", params, stream);
}
