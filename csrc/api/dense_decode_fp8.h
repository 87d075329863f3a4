// The ops of dense decode over FP8 caches; their schemas are in library.cpp.
#pragma once

#include <optional>
#include <tuple>

#include "api/tensor.h"
#include "api/text.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> dense_decode_fp8(
    const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
    const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
    const std::optional<Tensor>& attn_sink, int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant,
    const std::optional<Tensor>& descale_q, const std::optional<Tensor>& descale_k,
    const std::optional<Name>& kv_format);

void dense_decode_fp8_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                          const Tensor& cache_seqlens, const std::optional<Tensor>& tile_scheduler_metadata,
                          const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink,
                          int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant,
                          const std::optional<Tensor>& descale_q, const std::optional<Tensor>& descale_k,
                          const std::optional<Name>& kv_format, const Tensor& out, const Tensor& lse);

}  // namespace flash_mla::api
