#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_v41(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV41, KVFormat::kNone, 512>("sm100_sparse_paired_v41", params, stream);
}
