// The ops of sparse decode, and what its kernels take; schemas are in library.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "api/tensor.h"
#include "api/text.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> sparse_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& indices, const std::optional<Tensor>& topk_length,
    const std::optional<Tensor>& extra_k_cache, const std::optional<Tensor>& extra_indices,
    const std::optional<Tensor>& extra_topk_length, const std::optional<Tensor>& tile_scheduler_metadata,
    const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink, const Name& kv_format,
    const std::optional<Name>& extra_kv_format, int64_t head_dim_v, double softmax_scale, bool batch_invariant);

void sparse_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& indices,
                       const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
                       const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
                       const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
                       const std::optional<Tensor>& attn_sink, const Name& kv_format,
                       const std::optional<Name>& extra_kv_format, int64_t head_dim_v, double softmax_scale,
                       bool batch_invariant, const Tensor& out, const Tensor& lse);

std::tuple<Tensor, Tensor> plan_sparse_decode(const Tensor& requests, const std::optional<Tensor>& topk_length,
                                              const std::optional<Tensor>& extra_topk_length, int64_t s_q, int64_t h_q,
                                              int64_t topk, int64_t extra_topk);

// `scalar_type` of q: 0 bfloat16, 1 float16, 2 another. Formats: values of KVFormat.
std::string sparse_decode_why_not(int64_t compute_capability, int64_t scalar_type, int64_t kv_format,
                                  int64_t extra_kv_format, bool from_table, int64_t b, int64_t s_q, int64_t h_q,
                                  int64_t h_kv, int64_t d_qk, int64_t d_v, int64_t page_block_size,
                                  int64_t extra_page_block_size, int64_t topk, int64_t extra_topk,
                                  double softmax_scale);

}  // namespace flash_mla::api
