// The ops of dense prefill; their schemas are in library.cpp.
#pragma once

#include <string>
#include <tuple>

#include "api/tensor.h"

namespace flash_mla::api {

std::tuple<Tensor, Tensor> dense_prefill(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& cu_seqlens_qo,
                                         const Tensor& cu_seqlens_kv, int64_t max_seqlen_qo, int64_t max_seqlen_kv,
                                         double softmax_scale, bool causal, bool deterministic);

std::tuple<Tensor, Tensor, Tensor> dense_prefill_backward(const Tensor& d_out, const Tensor& d_lse, const Tensor& q,
                                                          const Tensor& k, const Tensor& v, const Tensor& out,
                                                          const Tensor& lse, const Tensor& cu_seqlens_qo,
                                                          const Tensor& cu_seqlens_kv, int64_t max_seqlen_qo,
                                                          int64_t max_seqlen_kv, double softmax_scale, bool causal,
                                                          bool deterministic);

std::string dense_prefill_why_not(int64_t compute_capability, int64_t scalar_type, int64_t h_q, int64_t h_kv,
                                  int64_t d_qk, int64_t d_v, double softmax_scale);

std::string dense_prefill_backward_why_not(int64_t compute_capability, int64_t scalar_type, int64_t h_q, int64_t h_kv,
                                           int64_t d_qk, int64_t d_v, double softmax_scale);

}  // namespace flash_mla::api
