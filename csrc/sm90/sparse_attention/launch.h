// What the kernel table sees of the sparse attention kernels: one launch per pair of cache formats.
#pragma once

#include "core/params/sparse_attention.h"

namespace flash_mla::sm90::sparse_attention {

void launch_v32(const SparseAttentionParams& params, void* stream);
void launch_v32_no_rope(const SparseAttentionParams& params, void* stream);
void launch_model1(const SparseAttentionParams& params, void* stream);
void launch_e4m3_576(const SparseAttentionParams& params, void* stream);
void launch_e4m3_512(const SparseAttentionParams& params, void* stream);
void launch_v41(const SparseAttentionParams& params, void* stream);      // V41 in both caches
void launch_v41_fp4(const SparseAttentionParams& params, void* stream);  // V41, and V41_FP4 in the second cache

}  // namespace flash_mla::sm90::sparse_attention
