// What the kernel tables see of the paired sparse attention kernels: a launch for each pair of cache formats, and those
// of dense decode, which is attention over the keys of a block table.
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

void launch_dense_bf16_576(const DenseDecodeParams& params, void* stream);
void launch_dense_bf16_512(const DenseDecodeParams& params, void* stream);
void launch_dense_fp16_576(const DenseDecodeParams& params, void* stream);
void launch_dense_fp16_512(const DenseDecodeParams& params, void* stream);

}  // namespace flash_mla::sm100::sparse_attention_paired
