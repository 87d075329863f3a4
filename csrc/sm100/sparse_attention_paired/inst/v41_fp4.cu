#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_v41_fp4(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV41, KVFormat::kV41Fp4, 512>("sm100_sparse_paired_v41_fp4", params, stream);
}
