#include "sm100/sparse_attention/launch.cuh"
#include "sm100/sparse_attention/launch.h"

void flash_mla::sm100::sparse_attention::launch_model1(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kModel1, KVFormat::kNone, 512>("sm100_sparse_attention_model1", params, stream);
}
