#include "sm90/sparse_attention/launch.cuh"
#include "sm90/sparse_attention/launch.h"

void flash_mla::sm90::sparse_attention::launch_e4m3_576(const SparseAttentionParams& params, void* stream) {
  launch<KVFormat::kE4m3, KVFormat::kNone, 576>("sm90_sparse_e4m3_576", params, stream);
}
