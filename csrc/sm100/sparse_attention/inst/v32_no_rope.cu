#include "sm100/sparse_attention/launch.cuh"
#include "sm100/sparse_attention/launch.h"

void flash_mla::sm100::sparse_attention::launch_v32_no_rope(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV32NoRope, KVFormat::kNone, 512>("sm100_sparse_attention_v32_no_rope", params, stream);
}
