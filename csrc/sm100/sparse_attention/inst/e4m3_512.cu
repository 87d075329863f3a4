#include "sm100/sparse_attention/launch.cuh"
#include "sm100/sparse_attention/launch.h"

void flash_mla::sm100::sparse_attention::launch_e4m3_512(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kE4m3NoRope, KVFormat::kNone, 512>("sm100_sparse_attention_e4m3_512", params, stream);
}
