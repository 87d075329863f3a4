#include "sm100/sparse_attention/launch.cuh"
#include "sm100/sparse_attention/launch.h"

void flash_mla::sm100::sparse_attention::launch_v41_fp4(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV41, KVFormat::kV41Fp4, 512>("sm100_sparse_attention_v41_fp4", params, stream);
}
