// What the kernel table sees of the paired sparse attention kernels.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla::sm100::sparse_attention_paired {

void launch_v32(const SparseAttentionParams& params, void* stream);
void launch_v32_no_rope(const SparseAttentionParams& params, void* stream);
void launch_model1(const SparseAttentionParams& params, void* stream);
void launch_v41(const SparseAttentionParams& params, void* stream);      // V41 in both caches
void launch_v41_fp4(const SparseAttentionParams& params, void* stream);  // V41, and V41_FP4 in the second cache
void launch_bf16_576(const SparseAttentionParams& params, void* stream);
void launch_bf16_512(const SparseAttentionParams& params, void* stream);

}  // namespace flash_mla::sm100::sparse_attention_paired
