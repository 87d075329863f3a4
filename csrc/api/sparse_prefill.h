// The op of sparse prefill; its schema is in library.cpp.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "api/tensor.h"
#include "api/text.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(
    const Tensor& q, const Tensor& kv, const Tensor& indices, const std::optional<Tensor>& topk_length,
    const std::optional<Tensor>& extra_k_cache, const std::optional<Tensor>& extra_indices,
    const std::optional<Tensor>& extra_topk_length, const std::optional<Tensor>& attn_sink, const Name& kv_format,
    const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale, const Name& lse_base);

void sparse_prefill_out(const Tensor& q, const Tensor& kv, const Tensor& indices,
                        const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
                        const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
                        const std::optional<Tensor>& attn_sink, const Name& kv_format,
                        const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale, const Name& lse_base,
                        const Tensor& out, const Tensor& max_logits, const Tensor& lse);

}  // namespace flash_mla::api
