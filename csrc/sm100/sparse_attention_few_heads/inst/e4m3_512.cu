#include "sm100/sparse_attention_few_heads/launch.cuh"
#include "sm100/sparse_attention_few_heads/launch.h"

void flash_mla::sm100::sparse_attention_few_heads::launch_e4m3_512(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kE4m3NoRope, KVFormat::kNone, 512>("sm100_sparse_few_heads_e4m3_512", params, stream);
}
