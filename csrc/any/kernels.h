// Kernels for every architecture: planning, combining of split results, merging of attention states, KV caches.
#pragma once

#include <cstdint>

#include "core/params/dense_decode.h"
#include "core/params/kv_cache.h"

namespace flash_mla {

struct PlanParams {
  const int32_t* cache_seqlens;  // [b]
  ScheduleRow* schedule;         // [num_parts]
  int32_t* num_splits;           // [b + 1], cumulative
  int b;
  int num_parts;  // rows of the schedule
  int rows;       // query rows of a row tile, 64 at the most
};

void launch_plan(const PlanParams& params, void* stream);

// Joins the partial results of split requests into `out` and `lse`.
void launch_combine(const DenseDecodeParams& params, void* stream);

constexpr int kMaxMergeParts = 16;

struct MergeParams {
  const void* outs[kMaxMergeParts];
  const float* lses[kMaxMergeParts];
  int64_t stride_out[kMaxMergeParts][3];  // batch, token, head; the last dimension is contiguous
  int64_t stride_lse[kMaxMergeParts][3];  // batch, token, head
  void* out;                              // contiguous [b, tokens, heads, d]
  float* lse;
  int64_t stride_merged_lse[3];
  int num_parts;
  int64_t num_rows;  // b * tokens * heads
  int tokens, heads, d;
  int element;  // 0 bf16, 1 fp16, 2 float32
};

void launch_merge(const MergeParams& params, void* stream);

// Rows into the slots of a cache, and all slots of a cache into rows.
void launch_append_kv_cache(const KVCacheParams& params, void* stream);
void launch_dequantize_kv_cache(const KVCacheParams& params, void* stream);

}  // namespace flash_mla
