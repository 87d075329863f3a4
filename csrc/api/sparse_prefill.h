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
    const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale, const Name& lse_base, bool deterministic);

void sparse_prefill_out(const Tensor& q, const Tensor& kv, const Tensor& indices,
                        const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
                        const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
                        const std::optional<Tensor>& attn_sink, const Name& kv_format,
                        const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale, const Name& lse_base,
                        bool deterministic, const Tensor& out, const Tensor& max_logits, const Tensor& lse);

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_prefill_backward(
    const Tensor& d_out, const Tensor& d_lse, const Tensor& q, const Tensor& kv, const Tensor& indices,
    const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
    const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
    const std::optional<Tensor>& attn_sink, const Name& kv_format, const std::optional<Name>& extra_kv_format,
    double sm_scale, const Name& lse_base, bool deterministic, const Tensor& out, const Tensor& lse);

// Asks the kernels of the backward without tensors: "name\treason\n" for each.
std::string sparse_prefill_backward_why_not(int64_t compute_capability, int64_t kv_format, int64_t extra_kv_format,
                                            int64_t h_q, int64_t d_qk, int64_t d_v, double sm_scale);

}  // namespace flash_mla::api
