#include "sm90/sparse_attention/launch.cuh"
#include "sm90/sparse_attention/launch.h"

void flash_mla::sm90::sparse_attention::launch_e4m3_512(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kE4m3NoRope, KVFormat::kNone, 512>("sm90_sparse_e4m3_512", params, stream);
}
