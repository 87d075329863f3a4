#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_v32_no_rope(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kV32NoRope, KVFormat::kNone, 512>("sm100_sparse_paired_v32_no_rope", params, stream);
}
