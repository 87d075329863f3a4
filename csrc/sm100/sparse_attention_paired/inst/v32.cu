#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_v32(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV32, KVFormat::kNone, 576>("sm100_sparse_paired_v32", params, stream);
}
