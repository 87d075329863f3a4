// Dense prefill over sequences laid end to end, and its gradients: checks, problem and parameters, plan, choice of a
// kernel, launch.
#include "api/dense_prefill.h"

#include <algorithm>
#include <cmath>

#include "any/kernels.h"
#include "api/decode.h"
#include "api/device.h"
#include "api/tables.h"

namespace flash_mla::api {
namespace {

constexpr char kOp[] = "dense_prefill";
constexpr char kBackwardOp[] = "dense_prefill_backward";
constexpr char kRunning[] = "[sequences + 1]";
constexpr int kSmallestRowTile = prefill_row_tile(90);
static_assert(kSmallestRowTile == 128);  // as the error text says

Element element_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Element::kBFloat16
         : dtype == ScalarType::Half   ? Element::kFloat16
                                       : Element::kOther;
}

struct Shapes {
  int64_t tokens_q, tokens_kv, sequences, h_q, h_kv, d_qk;
};

void check_running_lengths(const View& running, int device) {
  check_dim(running, 1, kRunning);
  check_dtype(running, ScalarType::Int);
  check_device(running, device);
  check(running.size(0) >= 1, ErrorKind::kValue, running.name, " must have shape ", kRunning, ", got ",
        ShapeText{running});
  check(running.size(0) <= 1 || running.stride(0) == 1, ErrorKind::kValue, running.name, " must be contiguous");
}

// TMA cannot be told that heads or tokens are the same memory.
void check_not_expanded(const View& view) {
  for (int d = 0; d < 2; ++d) {
    check(view.size(d) <= 1 || view.stride(d) > 0, ErrorKind::kUnsupported, view.name,
          " must not be expanded, got stride ", view.stride(d), " in dimension ", d);
  }
}

Shapes check_inputs(const View& q, const View& k, const View& v, const View& cu_q, const View& cu_kv,
                    int64_t max_seqlen_qo, int64_t max_seqlen_kv, double softmax_scale) {
  check(q.device >= 0, ErrorKind::kValue, "q must be on CUDA");
  check_dim(q, 3, "[tokens_q, h_q, d_qk]");
  check(element_of(q.dtype) != Element::kOther, ErrorKind::kType, "q must have dtype BFloat16 or Half, got ",
        dtype_text(q.dtype));
  check_dim(k, 3, "[tokens_kv, h_kv, d_qk]");
  check_dim(v, 3, "[tokens_kv, h_kv, d_v]");
  const Shapes s{q.size(0), k.size(0), cu_q.dim == 1 ? cu_q.size(0) - 1 : 0, q.size(1), k.size(1), q.size(2)};
  check(s.d_qk == 192 || s.d_qk == 128, ErrorKind::kValue, "q must have d_qk 192 or 128, got ", ShapeText{q});
  check(s.h_q > 0, ErrorKind::kValue, "q must have at least one head, got ", ShapeText{q});
  for (const View* view : {&k, &v}) {
    check_dtype(*view, q.dtype);
    check_device(*view, q.device);
    check_contiguous_last(*view);
  }
  check_contiguous_last(q);
  check_size(k, 2, s.d_qk, "[tokens_kv, h_kv, d_qk]");
  check_size(v, 0, s.tokens_kv, "[tokens_kv, h_kv, d_v]");
  check_size(v, 1, s.h_kv, "[tokens_kv, h_kv, d_v]");
  check_size(v, 2, kPrefillHeadDimV, "[tokens_kv, h_kv, d_v = 128]");
  check(s.h_kv > 0 && s.h_q % s.h_kv == 0, ErrorKind::kValue, "q's heads must be a multiple of k's heads, got ", s.h_q,
        " and ", s.h_kv);
  check_running_lengths(cu_q, q.device);
  check_running_lengths(cu_kv, q.device);
  check_size(cu_kv, 0, cu_q.size(0), kRunning);
  check(max_seqlen_qo >= 0 && max_seqlen_kv >= 0, ErrorKind::kValue,
        "max_seqlen_qo and max_seqlen_kv must not be negative, got ", max_seqlen_qo, " and ", max_seqlen_kv);
  check(std::isfinite(softmax_scale), ErrorKind::kValue, "softmax_scale must be finite, got ", softmax_scale);
  for (const View* view : {&q, &k, &v}) {
    check_aligned(*view, 2);
    check_not_expanded(*view);
  }
  // The plan numbers row tiles of heads, and the kernel tokens, in 32 bits.
  const int64_t items = (ceil_div<int64_t>(s.tokens_q, kSmallestRowTile) + s.sequences + 1) * s.h_q;
  check(std::max({s.tokens_q, s.tokens_kv, items}) < INT32_MAX / 2, ErrorKind::kUnsupported, kOp, " takes up to 2^30 ",
        "tokens, and so many tiles of 128 query rows over all heads; q has shape ", ShapeText{q}, ", k ", ShapeText{k});
  return s;
}

DensePrefillProblem problem_of(const View& q, const Shapes& s, const DeviceFacts& facts, double softmax_scale) {
  return {facts.compute_capability, element_of(q.dtype), static_cast<int>(s.h_q),          static_cast<int>(s.h_kv),
          static_cast<int>(s.d_qk), kPrefillHeadDimV,    static_cast<float>(softmax_scale)};
}

DensePrefillProblem asked(int64_t compute_capability, int64_t scalar_type, int64_t h_q, int64_t h_kv, int64_t d_qk,
                          int64_t d_v, double softmax_scale) {
  return {static_cast<int>(compute_capability),
          scalar_type == 0   ? Element::kBFloat16
          : scalar_type == 1 ? Element::kFloat16
                             : Element::kOther,
          static_cast<int>(h_q),
          static_cast<int>(h_kv),
          static_cast<int>(d_qk),
          static_cast<int>(d_v),
          static_cast<float>(softmax_scale)};
}

// All but the outputs and the plan.
DensePrefillParams make_params(const View& q, const View& k, const View& v, const View& cu_q, const View& cu_kv,
                               const Shapes& s, const DeviceFacts& facts, double softmax_scale, bool causal) {
  DensePrefillParams params{};
  params.q = q.data, params.k = k.data, params.v = v.data;
  params.cu_seqlens_qo = static_cast<const int32_t*>(cu_q.data);
  params.cu_seqlens_kv = static_cast<const int32_t*>(cu_kv.data);
  params.stride_q_t = q.stride(0), params.stride_q_h = q.stride(1);
  params.stride_k_t = k.stride(0), params.stride_k_h = k.stride(1);
  params.stride_v_t = v.stride(0), params.stride_v_h = v.stride(1);
  params.tokens_q = static_cast<int>(s.tokens_q), params.tokens_kv = static_cast<int>(s.tokens_kv);
  params.num_sequences = static_cast<int>(s.sequences);
  params.h_q = static_cast<int>(s.h_q), params.h_kv = static_cast<int>(s.h_kv), params.group = params.h_q / params.h_kv;
  params.d_qk = static_cast<int>(s.d_qk);
  params.row_tile = prefill_row_tile(facts.compute_capability);
  params.num_sms = facts.num_sms;
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.scale_log2 = scale_log2_of(softmax_scale);
  params.causal = causal;
  return params;
}

Tensor empty_plan(int device, const Shapes& s) {
  constexpr int64_t kWords = sizeof(PrefillSequence) / sizeof(int32_t);
  static_assert(sizeof(PrefillPlan) == sizeof(PrefillSequence));
  return empty(device, ScalarType::Int, {s.sequences + 2, kWords});  // with the tokens of no sequence
}

void set_plan(DensePrefillParams& params, const Tensor& plan) {
  params.plan = static_cast<PrefillPlan*>(plan.data_ptr());
  params.planned = reinterpret_cast<PrefillSequence*>(params.plan + 1);
}

void check_like(const View& view, int64_t tokens, int64_t heads, const char* what) {
  check(view.dim >= 2 && view.size(0) == tokens && view.size(1) == heads, ErrorKind::kValue, view.name,
        " must have shape ", what, " = [", tokens, ", ", heads, ", ...], got ", ShapeText{view});
}

// The most items that the backward's plan can have.
int64_t most_backward_items(const Shapes& s) {
  return (ceil_div<int64_t>(s.tokens_kv, kBackwardKeyTile) + s.sequences + 1) * s.h_kv;
}

// What the forward gave, and the gradients of it.
void check_results(const View& d_out, const View& d_lse, const View& out, const View& lse, const View& q,
                   const Shapes& s) {
  for (const View* view : {&d_out, &out}) {
    check_dim(*view, 3, "[tokens_q, h_q, 128]");
    check_like(*view, s.tokens_q, s.h_q, "[tokens_q, h_q, 128]");
    check_size(*view, 2, kPrefillHeadDimV, "[tokens_q, h_q, 128]");
    check_dtype(*view, q.dtype);
    check_device(*view, q.device);
    check_contiguous_last(*view);
    check_aligned(*view, 2);
  }
  check_not_expanded(d_out);
  for (const View* view : {&d_lse, &lse}) {
    check_dim(*view, 2, "[tokens_q, h_q]");
    check_like(*view, s.tokens_q, s.h_q, "[tokens_q, h_q]");
    check_dtype(*view, ScalarType::Float);
    check_device(*view, q.device);
  }
  check((s.tokens_q <= 1 || (out.stride(0) == s.h_q * kPrefillHeadDimV && lse.stride(0) == 1)) &&
            (s.h_q == 1 || (out.stride(1) == kPrefillHeadDimV && lse.stride(1) == std::max<int64_t>(s.tokens_q, 1))),
        ErrorKind::kValue, "out and lse must be laid out as ", kOp, " gives them");
  check(most_backward_items(s) < INT32_MAX / 2, ErrorKind::kUnsupported, kBackwardOp,
        " takes up to 2^30 tiles of 128 keys over all heads; got ", s.tokens_kv, " tokens of keys, ", s.sequences,
        " sequences and ", s.h_kv, " heads");
}

// [tokens, heads] float32, the tokens next to each other.
Tensor empty_lse(int device, int64_t tokens, int64_t heads) {
  const int64_t sizes[2] = {tokens, heads}, strides[2] = {1, std::max<int64_t>(tokens, 1)};
  AtenTensorHandle handle = nullptr;
  check(aoti_torch_empty_strided(2, sizes, strides, aoti_torch_dtype_float32(), aoti_torch_device_type_cuda(), device,
                                 &handle) == 0,
        ErrorKind::kCuda, "torch could not allocate a tensor of ", tokens * heads, " elements");
  return Tensor(handle);
}

}  // namespace

std::tuple<Tensor, Tensor> dense_prefill(const Tensor& q_, const Tensor& k_, const Tensor& v_,
                                         const Tensor& cu_seqlens_qo, const Tensor& cu_seqlens_kv,
                                         int64_t max_seqlen_qo, int64_t max_seqlen_kv, double softmax_scale,
                                         bool causal, bool /*deterministic*/) {
  const View q("q", q_), k("k", k_), v("v", v_), cu_q("cu_seqlens_qo", cu_seqlens_qo),
      cu_kv("cu_seqlens_kv", cu_seqlens_kv);
  const Shapes s = check_inputs(q, k, v, cu_q, cu_kv, max_seqlen_qo, max_seqlen_kv, softmax_scale);
  const OnDevice on_device(q.device);
  const DeviceFacts& facts = device_facts(q.device);
  const auto& kernel = select(kOp, dense_prefill_kernels(), problem_of(q, s, facts, softmax_scale));
  Tensor out = empty(q.device, q.dtype, {s.tokens_q, s.h_q, kPrefillHeadDimV});
  Tensor lse = empty_lse(q.device, s.tokens_q, s.h_q);
  if (s.tokens_q == 0) {
    return {out, lse};
  }
  Tensor plan = empty_plan(q.device, s);
  DensePrefillParams params = make_params(q, k, v, cu_q, cu_kv, s, facts, softmax_scale, causal);
  params.out = out.data_ptr();
  params.lse = static_cast<float*>(lse.data_ptr());
  set_plan(params, plan);
  void* stream = current_stream(q.device);
  launch_prefill_plan(params, stream);
  kernel.launch(params, stream);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> dense_prefill_backward(const Tensor& d_out_, const Tensor& d_lse_, const Tensor& q_,
                                                          const Tensor& k_, const Tensor& v_, const Tensor& out_,
                                                          const Tensor& lse_, const Tensor& cu_seqlens_qo,
                                                          const Tensor& cu_seqlens_kv, int64_t max_seqlen_qo,
                                                          int64_t max_seqlen_kv, double softmax_scale, bool causal,
                                                          bool deterministic) {
  const View d_out("d_out", d_out_), d_lse("d_lse", d_lse_), q("q", q_), k("k", k_), v("v", v_), out("out", out_),
      lse("lse", lse_), cu_q("cu_seqlens_qo", cu_seqlens_qo), cu_kv("cu_seqlens_kv", cu_seqlens_kv);
  const Shapes s = check_inputs(q, k, v, cu_q, cu_kv, max_seqlen_qo, max_seqlen_kv, softmax_scale);
  check_results(d_out, d_lse, out, lse, q, s);
  const OnDevice on_device(q.device);
  const DeviceFacts& facts = device_facts(q.device);
  const auto& kernel = select(kBackwardOp, dense_prefill_backward_kernels(), problem_of(q, s, facts, softmax_scale));
  Tensor dq = empty(q.device, q.dtype, {s.tokens_q, s.h_q, s.d_qk});
  Tensor dk = empty(q.device, q.dtype, {s.tokens_kv, s.h_kv, s.d_qk});
  Tensor dv = empty(q.device, q.dtype, {s.tokens_kv, s.h_kv, kPrefillHeadDimV});

  Tensor dq_sum = empty(q.device, ScalarType::Float, {s.h_q, s.tokens_q, s.d_qk});
  Tensor deltas = empty(q.device, ScalarType::Float, {s.h_q, s.tokens_q});
  Tensor plan = empty_plan(q.device, s);
  Tensor items =
      empty(q.device, ScalarType::Int, {most_backward_items(s), int64_t{sizeof(BackwardItem) / sizeof(int32_t)}});
  Tensor turns = empty(q.device, ScalarType::Int, {deterministic ? s.h_q : 0, s.tokens_q});

  DensePrefillBackwardParams params{};
  params.forward = make_params(q, k, v, cu_q, cu_kv, s, facts, softmax_scale, causal);
  params.forward.out = out.data;
  params.forward.lse = static_cast<float*>(lse.data);
  set_plan(params.forward, plan);
  params.d_out = d_out.data;
  params.d_lse = static_cast<const float*>(d_lse.data);
  params.dq = dq.data_ptr(), params.dk = dk.data_ptr(), params.dv = dv.data_ptr();
  params.dq_sum = static_cast<float*>(dq_sum.data_ptr());
  params.deltas = static_cast<float*>(deltas.data_ptr());
  params.items = static_cast<BackwardItem*>(items.data_ptr());
  params.turns = deterministic ? static_cast<int32_t*>(turns.data_ptr()) : nullptr;
  params.stride_do_t = d_out.stride(0), params.stride_do_h = d_out.stride(1);
  params.stride_dlse_t = d_lse.stride(0), params.stride_dlse_h = d_lse.stride(1);
  params.element = element_of(q.dtype);
  void* stream = current_stream(q.device);
  if (s.tokens_kv > 0) {
    launch_prefill_backward_plan(params, stream);
  }
  launch_prefill_backward_prepare(params, stream);
  if (s.tokens_kv > 0) {
    kernel.launch(params, stream);
  }
  launch_prefill_backward_finish(params, stream);
  return {dq, dk, dv};
}

std::string dense_prefill_why_not(int64_t compute_capability, int64_t scalar_type, int64_t h_q, int64_t h_kv,
                                  int64_t d_qk, int64_t d_v, double softmax_scale) {
  return explain(dense_prefill_kernels(), asked(compute_capability, scalar_type, h_q, h_kv, d_qk, d_v, softmax_scale));
}

std::string dense_prefill_backward_why_not(int64_t compute_capability, int64_t scalar_type, int64_t h_q, int64_t h_kv,
                                           int64_t d_qk, int64_t d_v, double softmax_scale) {
  return explain(dense_prefill_backward_kernels(),
                 asked(compute_capability, scalar_type, h_q, h_kv, d_qk, d_v, softmax_scale));
}

}  // namespace flash_mla::api
