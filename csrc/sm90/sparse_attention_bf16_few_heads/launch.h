// What the kernel table sees of the sparse attention kernels for few heads over bfloat16 rows: one launch per
// d_qk.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_bf16_few_heads {

// Query rows of a unit that the kernels take.
constexpr int kMostRows = 32;

void launch_576(const SparseAttentionParams& params, void* stream);
void launch_512(const SparseAttentionParams& params, void* stream);

}  // namespace flash_mla::sm90::sparse_attention_bf16_few_heads
