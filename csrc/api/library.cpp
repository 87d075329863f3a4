// Every op: its schema and its binding.
#include <torch/csrc/stable/library.h>

#include "api/dense_decode.h"
#include "api/dense_decode_fp8.h"
#include "api/dense_prefill.h"
#include "api/kv_cache.h"
#include "api/merge.h"
#include "api/sparse_decode.h"
#include "api/sparse_prefill.h"

#ifndef FLASH_MLA_VERSION
#define FLASH_MLA_VERSION "unknown"
#endif
#ifndef FLASH_MLA_ARCHES
#define FLASH_MLA_ARCHES ""
#endif
#ifndef FLASH_MLA_CUDA_VERSION
#define FLASH_MLA_CUDA_VERSION "unknown"
#endif

namespace flash_mla::api {
namespace {

std::string build_info() {
  return "version=" FLASH_MLA_VERSION "\ncuda=" FLASH_MLA_CUDA_VERSION "\narchs=" FLASH_MLA_ARCHES
#ifdef FLASH_MLA_WITH_SM100
         "\nnote=code for 100f has not been run on Blackwell hardware"
#endif
         "\ntorch_target=2.10\n";
}

}  // namespace

STABLE_TORCH_LIBRARY(flash_mla, m) {
  m.def(
      "dense_decode(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? "
      "tile_scheduler_metadata, Tensor? num_splits, Tensor? attn_sink, int head_dim_v, "
      "float softmax_scale, bool causal, bool batch_invariant) -> (Tensor, Tensor)");
  m.def(
      "dense_decode_out(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? "
      "tile_scheduler_metadata, Tensor? num_splits, Tensor? attn_sink, int head_dim_v, "
      "float softmax_scale, bool causal, bool batch_invariant, Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("plan_dense_decode(Tensor cache_seqlens, int s_q, int h_q, int h_kv) -> (Tensor, Tensor)");
  m.def("num_sm_parts(int device_index, int s_q, int h_q, int h_kv) -> int");
  m.def("merge_attention_states(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)");
  m.def(
      "dense_decode_why_not(int compute_capability, int scalar_type, int b, int s_q, int h_q, int h_kv, int d_qk, int "
      "d_v, int page_block_size, float softmax_scale) -> str");
  m.def(
      "dense_decode_fp8(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? "
      "tile_scheduler_metadata, Tensor? num_splits, Tensor? attn_sink, int head_dim_v, float softmax_scale, "
      "bool causal, bool batch_invariant, Tensor? descale_q, Tensor? descale_k, str? kv_format) -> (Tensor, Tensor)");
  m.def(
      "dense_decode_fp8_out(Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? "
      "tile_scheduler_metadata, Tensor? num_splits, Tensor? attn_sink, int head_dim_v, float softmax_scale, "
      "bool causal, bool batch_invariant, Tensor? descale_q, Tensor? descale_k, str? kv_format, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "sparse_decode(Tensor q, Tensor k_cache, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, Tensor? "
      "extra_indices, Tensor? extra_topk_length, Tensor? tile_scheduler_metadata, Tensor? num_splits, Tensor? "
      "attn_sink, str kv_format, str? extra_kv_format, int head_dim_v, float softmax_scale, bool batch_invariant) "
      "-> (Tensor, Tensor)");
  m.def(
      "sparse_decode_out(Tensor q, Tensor k_cache, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, Tensor? "
      "extra_indices, Tensor? extra_topk_length, Tensor? tile_scheduler_metadata, Tensor? num_splits, Tensor? "
      "attn_sink, str kv_format, str? extra_kv_format, int head_dim_v, float softmax_scale, bool batch_invariant, "
      "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "plan_sparse_decode(Tensor requests, Tensor? topk_length, Tensor? extra_topk_length, int s_q, int h_q, int topk, "
      "int extra_topk) -> (Tensor, Tensor)");
  m.def(
      "sparse_prefill(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, Tensor? "
      "extra_indices, Tensor? extra_topk_length, Tensor? attn_sink, str kv_format, str? extra_kv_format, int d_v, "
      "float "
      "sm_scale, str lse_base, bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sparse_prefill_out(Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, Tensor? "
      "extra_indices, Tensor? extra_topk_length, Tensor? attn_sink, str kv_format, str? extra_kv_format, int d_v, "
      "float "
      "sm_scale, str lse_base, bool deterministic, Tensor(a!) out, Tensor(b!) max_logits, Tensor(c!) lse) -> ()");
  m.def(
      "sparse_prefill_backward(Tensor d_out, Tensor d_lse, Tensor q, Tensor kv, Tensor indices, Tensor? topk_length, "
      "Tensor? extra_k_cache, Tensor? extra_indices, Tensor? extra_topk_length, Tensor? attn_sink, str kv_format, str? "
      "extra_kv_format, float sm_scale, str lse_base, bool deterministic, Tensor out, Tensor lse) -> (Tensor, Tensor, "
      "Tensor, Tensor)");
  m.def(
      "sparse_prefill_backward_why_not(int compute_capability, int kv_format, int extra_kv_format, int h_q, int d_qk, "
      "int d_v, float sm_scale) -> str");
  m.def(
      "sparse_decode_why_not(int compute_capability, int scalar_type, int kv_format, int extra_kv_format, "
      "bool from_table, int b, int s_q, int h_q, int h_kv, int d_qk, int d_v, int page_block_size, int "
      "extra_page_block_size, int topk, int extra_topk, float softmax_scale) -> str");
  m.def(
      "dense_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_qo, Tensor cu_seqlens_kv, int max_seqlen_qo, int "
      "max_seqlen_kv, float softmax_scale, bool causal, bool deterministic) -> (Tensor, Tensor)");
  m.def(
      "dense_prefill_backward(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor "
      "cu_seqlens_qo, Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, bool causal, "
      "bool deterministic) -> (Tensor, Tensor, Tensor)");
  m.def(
      "dense_prefill_backward_why_not(int compute_capability, int scalar_type, int h_q, int h_kv, int d_qk, int d_v, "
      "float softmax_scale) -> str");
  m.def(
      "dense_prefill_why_not(int compute_capability, int scalar_type, int h_q, int h_kv, int d_qk, int d_v, "
      "float softmax_scale) -> str");
  m.def("append_kv_cache(Tensor kv, Tensor(a!) cache, Tensor slot_mapping, str kv_format, bool exact_scale) -> ()");
  m.def("dequantize_kv_cache(Tensor cache, str kv_format) -> Tensor");
  m.def("kv_cache_why_not(int compute_capability) -> str");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(flash_mla, CUDA, m) {
  m.impl("dense_decode", TORCH_BOX(&dense_decode));
  m.impl("dense_decode_out", TORCH_BOX(&dense_decode_out));
  m.impl("plan_dense_decode", TORCH_BOX(&plan_dense_decode));
  m.impl("merge_attention_states", TORCH_BOX(&merge_attention_states));
  m.impl("dense_decode_fp8", TORCH_BOX(&dense_decode_fp8));
  m.impl("dense_decode_fp8_out", TORCH_BOX(&dense_decode_fp8_out));
  m.impl("sparse_decode", TORCH_BOX(&sparse_decode));
  m.impl("sparse_decode_out", TORCH_BOX(&sparse_decode_out));
  m.impl("plan_sparse_decode", TORCH_BOX(&plan_sparse_decode));
  m.impl("sparse_prefill", TORCH_BOX(&sparse_prefill));
  m.impl("sparse_prefill_out", TORCH_BOX(&sparse_prefill_out));
  m.impl("sparse_prefill_backward", TORCH_BOX(&sparse_prefill_backward));
  m.impl("dense_prefill", TORCH_BOX(&dense_prefill));
  m.impl("dense_prefill_backward", TORCH_BOX(&dense_prefill_backward));
  m.impl("append_kv_cache", TORCH_BOX(&append_kv_cache));
  m.impl("dequantize_kv_cache", TORCH_BOX(&dequantize_kv_cache));
}

STABLE_TORCH_LIBRARY_IMPL(flash_mla, CompositeExplicitAutograd, m) {
  m.impl("num_sm_parts", TORCH_BOX(&num_sm_parts));
  m.impl("dense_decode_why_not", TORCH_BOX(&dense_decode_why_not));
  m.impl("sparse_decode_why_not", TORCH_BOX(&sparse_decode_why_not));
  m.impl("sparse_prefill_backward_why_not", TORCH_BOX(&sparse_prefill_backward_why_not));
  m.impl("dense_prefill_why_not", TORCH_BOX(&dense_prefill_why_not));
  m.impl("dense_prefill_backward_why_not", TORCH_BOX(&dense_prefill_backward_why_not));
  m.impl("kv_cache_why_not", TORCH_BOX(&kv_cache_why_not));
  m.impl("build_info", TORCH_BOX(&build_info));
}

}  // namespace flash_mla::api
