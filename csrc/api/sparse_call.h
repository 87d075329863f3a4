// What the ops that sparse attention kernels serve have in common: a call's tensors beside its keys, and its run.
#pragma once

#include <algorithm>
#include <optional>
#include <tuple>

#include "any/kernels.h"
#include "api/decode.h"
#include "api/device.h"
#include "api/kv_format.h"
#include "api/sparse_keys.h"
#include "api/tables.h"

namespace flash_mla::api {

inline void check_query(const View& q) {
  check(q.device >= 0, ErrorKind::kValue, "q must be on CUDA");
  check_dim(q, 4, "[b, s_q, h_q, d_qk]");
  check(q.size(3) == 576 || q.size(3) == 512, ErrorKind::kValue, "q must have d_qk 576 or 512, got ", ShapeText{q});
  check(q.size(1) > 0 && q.size(2) > 0, ErrorKind::kValue, "q must have at least one query token and head, got ",
        ShapeText{q});
  check_contiguous_last(q);
}

// A call's tensors beside its keys.
struct SparseCommon {
  View q;
  std::optional<View> schedule, num_splits, sink;
  double softmax_scale;
  bool batch_invariant;

  SparseCommon(const Tensor& q_, const std::optional<Tensor>& schedule_, const std::optional<Tensor>& num_splits_,
               const std::optional<Tensor>& sink_, int64_t head_dim_v, double softmax_scale_, bool batch_invariant_)
      : q("q", q_),
        schedule(optional_view("tile_scheduler_metadata", schedule_)),
        num_splits(optional_view("num_splits", num_splits_)),
        sink(optional_view("attn_sink", sink_)),
        softmax_scale(softmax_scale_),
        batch_invariant(batch_invariant_) {
    check_query(q);
    check_options(q, head_dim_v, softmax_scale);
    if (schedule && num_splits) {
      check_schedule(*schedule, *num_splits, q.size(0), q.device);
    }
    if (sink) {
      check_sink(*sink, q.size(2), q.device);
    }
  }

  bool has_schedule() const { return schedule && num_splits; }

  SparseAttentionProblem problem(const DeviceFacts& facts, KVFormat format) const {
    SparseAttentionProblem problem{};
    problem.compute_capability = facts.compute_capability;
    problem.element = q.dtype == ScalarType::BFloat16 ? Element::kBFloat16 : Element::kOther;
    problem.format = format, problem.extra_format = KVFormat::kNone;
    problem.b = static_cast<int>(q.size(0)), problem.s_q = static_cast<int>(q.size(1));
    problem.h_q = static_cast<int>(q.size(2)), problem.d_qk = static_cast<int>(q.size(3));
    problem.d_v = kHeadDimV;
    problem.softmax_scale = static_cast<float>(softmax_scale);
    return problem;
  }

  SparseAttentionParams params(const DeviceFacts& facts, const View& out, const View& lse) const {
    SparseAttentionParams params{};
    params.q = q.data;
    params.attn_sink = sink ? static_cast<const float*>(sink->data) : nullptr;
    params.out = out.data;
    params.lse = static_cast<float*>(lse.data);
    params.stride_q_b = q.stride(0), params.stride_q_s = q.stride(1), params.stride_q_h = q.stride(2);
    params.stride_out_b = out.stride(0), params.stride_out_s = out.stride(1), params.stride_out_h = out.stride(2);
    params.stride_lse_b = lse.stride(0), params.stride_lse_h = lse.stride(1), params.stride_lse_s = lse.stride(2);
    params.b = static_cast<int>(q.size(0)), params.s_q = static_cast<int>(q.size(1));
    params.h_q = static_cast<int>(q.size(2));
    params.tokens_per_batch = 1;
    params.num_requests_total = params.b;
    params.num_sms = facts.num_sms;
    params.scale_log2 = scale_log2_of(softmax_scale);
    return params;
  }
};

// Tells the kernel to cut every request by itself, allocates what that needs, and says how many requests a launch
// takes.
inline int64_t prepare_fixed_cuts(const SparseKernel& kernel, SparseAttentionParams& params, int device,
                                  std::optional<Tensor>& partials) {
  const int64_t tiles = static_cast<int64_t>(params.num_units) * params.unit_tiles;
  params.max_cuts = choose_max_cuts(tiles, unit_blocks(params.keys[0].topk, params.keys[1].topk), params.num_sms);
  const int64_t at_once =
      std::min<int64_t>(choose_requests_at_once(tiles, params.max_cuts, params.num_sms), params.num_requests_total);
  if (params.max_cuts > 1) {
    partials = allocate_partials(kernel, device, at_once * params.max_cuts * tiles, params);
  }
  return at_once;
}

template <class Call>
std::tuple<Tensor, Tensor> run_into_new(const Call& call) {
  const View& q = call.common.q;
  const OnDevice on_device(q.device);
  Tensor out = empty(q.device, ScalarType::BFloat16, {q.size(0), q.size(1), q.size(2), kHeadDimV});
  Tensor lse = empty(q.device, ScalarType::Float, {q.size(0), q.size(2), q.size(1)});
  call.run(View("out", out), View("lse", lse));
  return {out, lse};
}

template <class Call>
void run_into(const Call& call, const Tensor& out, const Tensor& lse) {
  const View& q = call.common.q;
  const OnDevice on_device(q.device);
  const View out_view("out", out), lse_view("lse", lse);
  check_outputs(out_view, lse_view, q, ScalarType::BFloat16);
  call.run(out_view, lse_view);
}

}  // namespace flash_mla::api
