#include "sm90/sparse_attention_paired/launch.cuh"
#include "sm90/sparse_attention_paired/launch.h"

void flash_mla::sm90::sparse_attention_paired::launch_model1(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kModel1, KVFormat::kNone, 512>("sm90_sparse_paired_model1", params, stream);
}
