#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_model1(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kModel1, KVFormat::kNone, 512>("sm100_sparse_paired_model1", params, stream);
}
