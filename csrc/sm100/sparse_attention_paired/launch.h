// What the kernel table sees of the paired sparse attention kernels.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla::sm100::sparse_attention_paired {

void launch_bf16_576(const SparseAttentionParams& params, void* stream);
void launch_bf16_512(const SparseAttentionParams& params, void* stream);

}  // namespace flash_mla::sm100::sparse_attention_paired
