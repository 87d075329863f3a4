// What the ops over sparse attention kernels share: where keys come from.
#pragma once

#include "api/tensor.h"
#include "core/kernel_table.h"
#include "core/params/sparse_attention.h"

namespace flash_mla::api {

using SparseKernel = Kernel<SparseAttentionProblem, SparseAttentionParams>;

constexpr int64_t kMostKeys = INT32_MAX - kScheduleBlock;

// A cache [num_blocks, page, 1, d_qk or bytes per token] of a format, for `q`, whose last dimension is d_qk.
void check_rows(const View& cache, KVFormat format, const View& q);

// The rows of a cache, without an index list.
KeySource source_of_cache(const View& cache);

}  // namespace flash_mla::api
