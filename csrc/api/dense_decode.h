// The ops of dense decode; their schemas are in library.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "api/tensor.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> dense_decode(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                                        const Tensor& cache_seqlens,
                                        const std::optional<Tensor>& tile_scheduler_metadata,
                                        const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink,
                                        int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant);

void dense_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                      const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
                      const std::optional<Tensor>& attn_sink, int64_t head_dim_v, double softmax_scale, bool causal,
                      bool batch_invariant, const Tensor& out, const Tensor& lse);

int64_t num_sm_parts(int64_t device_index, int64_t s_q, int64_t h_q, int64_t h_kv);

std::tuple<Tensor, Tensor> plan_dense_decode(const Tensor& cache_seqlens, int64_t s_q, int64_t h_q, int64_t h_kv);

std::string dense_decode_why_not(int64_t compute_capability, int64_t scalar_type, int64_t b, int64_t s_q, int64_t h_q,
                                 int64_t h_kv, int64_t d_qk, int64_t d_v, int64_t page_block_size,
                                 double softmax_scale);

}  // namespace flash_mla::api
