// What the kernel table sees of the sparse attention kernel over bfloat16 rows.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention_bf16 {

void launch_576(const SparseAttentionParams& params, void* stream);
void launch_512(const SparseAttentionParams& params, void* stream);

}  // namespace flash_mla::sm90::sparse_attention_bf16
