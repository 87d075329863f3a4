#include "sm100/sparse_attention/launch.cuh"
#include "sm100/sparse_attention/launch.h"

void flash_mla::sm100::sparse_attention::launch_v32(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV32, KVFormat::kNone, 576>("sm100_sparse_attention_v32", params, stream);
}
