#include "sm90/sparse_attention_few_heads/launch.cuh"
#include "sm90/sparse_attention_few_heads/launch.h"

void flash_mla::sm90::sparse_attention_few_heads::launch_v32_no_rope(const SparseAttentionParams& params,
                                                                     void* stream) {
  launch<KVFormat::kV32NoRope, KVFormat::kNone, 512>("sm90_sparse_few_heads_v32_no_rope", params, stream);
}
