// Dense MLA decode: checks, problem and parameters, choice of a kernel, launch.
#include "api/dense_decode.h"

#include <algorithm>

#include "any/kernels.h"
#include "api/decode.h"
#include "api/device.h"
#include "api/tables.h"

namespace flash_mla::api {
namespace {

constexpr char kOp[] = "dense_decode";

int tma_box_rows(int64_t page) {
  if (page % kScheduleBlock == 0) {
    return kScheduleBlock;
  }
  return page == 16 || page == 32 ? static_cast<int>(page) : 0;
}

Element element_of(ScalarType dtype) {
  return dtype == ScalarType::BFloat16 ? Element::kBFloat16
         : dtype == ScalarType::Half   ? Element::kFloat16
                                       : Element::kOther;
}

struct Shapes {
  int64_t b, s_q, h_q, d_qk, num_pages, page, h_kv;
};

Shapes check_inputs(const View& q, const View& k, const View& table, const View& seqlens, int64_t head_dim_v,
                    double softmax_scale) {
  check(q.device >= 0, ErrorKind::kValue, "q must be on CUDA");
  check_dim(q, 4, "[b, s_q, h_q, d_qk]");
  check(element_of(q.dtype) != Element::kOther, ErrorKind::kType, "q must have dtype BFloat16 or Half, got ",
        dtype_text(q.dtype));
  check_dim(k, 4, "[num_blocks, page, h_kv, d_qk]");
  check_dtype(k, q.dtype);
  check_device(k, q.device);
  const Shapes s{q.size(0), q.size(1), q.size(2), q.size(3), k.size(0), k.size(1), k.size(2)};
  check(s.d_qk == 576 || s.d_qk == 512, ErrorKind::kValue, "q must have d_qk 576 or 512, got ", ShapeText{q});
  check_size(k, 3, s.d_qk, "[num_blocks, page, h_kv, d_qk]");
  check(s.s_q > 0 && s.h_q > 0, ErrorKind::kValue, "q must have at least one query token and head, got ", ShapeText{q});
  check(s.num_pages > 0 && s.page > 0 && s.h_kv > 0, ErrorKind::kValue, "k_cache must not be empty, got ",
        ShapeText{k});
  check(s.h_q % s.h_kv == 0, ErrorKind::kValue, "q's heads must be a multiple of k_cache's heads, got ", s.h_q, " and ",
        s.h_kv);
  check_contiguous_last(q);
  check_contiguous_last(k);
  check_options(q, head_dim_v, softmax_scale);
  check_paging(table, seqlens, s.b, s.page, q.device);
  check_aligned(q, 2);
  check_aligned(k, 2);
  return s;
}

void run(const View& q, const View& k, const View& table, const View& seqlens, const std::optional<View>& schedule,
         const std::optional<View>& num_splits, const std::optional<View>& sink, int64_t head_dim_v,
         double softmax_scale, bool causal, bool batch_invariant, const Shapes& s, const View& out, const View& lse) {
  const DeviceFacts& facts = device_facts(q.device);
  const DenseDecodeProblem problem{facts.compute_capability, element_of(q.dtype),
                                   static_cast<int>(s.b),    static_cast<int>(s.s_q),
                                   static_cast<int>(s.h_q),  static_cast<int>(s.h_kv),
                                   static_cast<int>(s.d_qk), static_cast<int>(head_dim_v),
                                   static_cast<int>(s.page), static_cast<float>(softmax_scale)};
  const auto& kernel = select(kOp, dense_decode_kernels(), problem);
  if (s.b == 0) {
    return;
  }
  DenseDecodeParams params{};
  params.q = q.data;
  params.k_cache = k.data;
  params.block_table = static_cast<const int32_t*>(table.data);
  params.cache_seqlens = static_cast<const int32_t*>(seqlens.data);
  params.attn_sink = sink ? static_cast<const float*>(sink->data) : nullptr;
  params.out = out.data;
  params.lse = static_cast<float*>(lse.data);
  params.stride_q_b = q.stride(0), params.stride_q_s = q.stride(1), params.stride_q_h = q.stride(2);
  params.stride_k_page = k.stride(0), params.stride_k_row = k.stride(1), params.stride_k_h = k.stride(2);
  params.stride_table_b = table.stride(0);
  params.stride_out_b = out.stride(0), params.stride_out_s = out.stride(1), params.stride_out_h = out.stride(2);
  params.stride_lse_b = lse.stride(0), params.stride_lse_h = lse.stride(1), params.stride_lse_s = lse.stride(2);
  params.b = problem.b, params.s_q = problem.s_q, params.h_q = problem.h_q, params.h_kv = problem.h_kv;
  params.group = params.h_q / params.h_kv;
  params.num_row_tiles = ceil_div(params.s_q * params.group, kRowTile);
  params.page = problem.page_block_size;
  params.num_pages = static_cast<int>(s.num_pages);
  params.max_pages = static_cast<int>(table.size(1));
  params.box_rows = tma_box_rows(s.page);
  params.page_shift = page_shift_of(s.page);
  params.scale_log2 = scale_log2_of(softmax_scale);
  params.causal = causal;
  params.element = problem.element;
  params.num_sms = facts.num_sms;
  void* stream = current_stream(q.device);
  const int64_t tiles = static_cast<int64_t>(params.h_kv) * params.num_row_tiles;
  if (!batch_invariant) {
    launch_scheduled(kernel, params, schedule, num_splits, tiles, q.device, stream);
    return;
  }
  const int64_t most_blocks = ceil_div<int64_t>(table.size(1) * s.page, kScheduleBlock);
  params.max_cuts = choose_max_cuts(tiles, most_blocks, facts.num_sms);
  const int64_t at_once = choose_requests_at_once(tiles, params.max_cuts, facts.num_sms);
  std::optional<Tensor> partials;
  if (params.max_cuts > 1) {
    partials = allocate_partials(kernel, q.device, std::min(at_once, s.b) * params.max_cuts * tiles, params);
  }
  launch_fixed_cuts(kernel, params, 0, s.b, at_once, stream);
}

// The tensors of a call, checked.
struct Call {
  View q, k, table, seqlens;
  std::optional<View> schedule, num_splits, sink;
  Shapes shapes;

  Call(const Tensor& q_, const Tensor& k_, const Tensor& table_, const Tensor& seqlens_,
       const std::optional<Tensor>& schedule_, const std::optional<Tensor>& num_splits_,
       const std::optional<Tensor>& sink_, int64_t head_dim_v, double softmax_scale)
      : q("q", q_),
        k("k_cache", k_),
        table("block_table", table_),
        seqlens("cache_seqlens", seqlens_),
        schedule(optional_view("tile_scheduler_metadata", schedule_)),
        num_splits(optional_view("num_splits", num_splits_)),
        sink(optional_view("attn_sink", sink_)),
        shapes(check_inputs(q, k, table, seqlens, head_dim_v, softmax_scale)) {
    if (schedule && num_splits) {
      check_schedule(*schedule, *num_splits, shapes.b, q.device);
    }
    if (sink) {
      check_sink(*sink, shapes.h_q, q.device);
    }
  }
};

}  // namespace

std::tuple<Tensor, Tensor> dense_decode(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                                        const Tensor& cache_seqlens,
                                        const std::optional<Tensor>& tile_scheduler_metadata,
                                        const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink,
                                        int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant) {
  const Call call(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink, head_dim_v,
                  softmax_scale);
  const OnDevice on_device(call.q.device);
  const Shapes& s = call.shapes;
  Tensor out = empty(call.q.device, call.q.dtype, {s.b, s.s_q, s.h_q, kHeadDimV});
  Tensor lse = empty(call.q.device, ScalarType::Float, {s.b, s.h_q, s.s_q});
  run(call.q, call.k, call.table, call.seqlens, call.schedule, call.num_splits, call.sink, head_dim_v, softmax_scale,
      causal, batch_invariant, s, View("out", out), View("lse", lse));
  return {out, lse};
}

void dense_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
                      const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
                      const std::optional<Tensor>& attn_sink, int64_t head_dim_v, double softmax_scale, bool causal,
                      bool batch_invariant, const Tensor& out, const Tensor& lse) {
  const Call call(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink, head_dim_v,
                  softmax_scale);
  const OnDevice on_device(call.q.device);
  const View out_view("out", out), lse_view("lse", lse);
  check_outputs(out_view, lse_view, call.q, call.q.dtype);
  run(call.q, call.k, call.table, call.seqlens, call.schedule, call.num_splits, call.sink, head_dim_v, softmax_scale,
      causal, batch_invariant, call.shapes, out_view, lse_view);
}

int64_t num_sm_parts(int64_t device_index, int64_t s_q, int64_t h_q, int64_t h_kv) {
  check(s_q > 0 && h_q > 0 && h_kv > 0 && h_q % h_kv == 0, ErrorKind::kValue,
        "s_q, h_q and h_kv must be positive and h_q a multiple of h_kv, got ", s_q, ", ", h_q, ", ", h_kv);
  const int64_t tiles = h_kv * ceil_div<int64_t>(s_q * (h_q / h_kv), kRowTile);
  return choose_num_parts(tiles, device_facts(static_cast<int>(device_index)).num_sms);
}

std::tuple<Tensor, Tensor> plan_dense_decode(const Tensor& cache_seqlens, int64_t s_q, int64_t h_q, int64_t h_kv) {
  const View seqlens("cache_seqlens", cache_seqlens);
  check_dim(seqlens, 1, "[b]");
  check_dtype(seqlens, ScalarType::Int);
  check(seqlens.device >= 0, ErrorKind::kValue, "cache_seqlens must be on CUDA");
  check(seqlens.size(0) <= 1 || seqlens.stride(0) == 1, ErrorKind::kValue, "cache_seqlens must be contiguous");
  const OnDevice on_device(seqlens.device);
  check_built_for("plan_dense_decode", seqlens.device);
  const int64_t b = seqlens.size(0), parts = num_sm_parts(seqlens.device, s_q, h_q, h_kv);
  Tensor schedule = empty(seqlens.device, ScalarType::Int, {parts, 8});
  Tensor num_splits = empty(seqlens.device, ScalarType::Int, {b + 1});
  const int64_t rows = s_q * (h_q / h_kv);
  PlanParams params{};
  params.lengths[0] = {static_cast<const int32_t*>(seqlens.data), 1, 0, 1, INT32_MAX};
  params.lengths[1] = {nullptr, 0, 0, 1, 0};
  params.schedule = static_cast<ScheduleRow*>(schedule.data_ptr());
  params.num_splits = static_cast<int32_t*>(num_splits.data_ptr());
  params.b = static_cast<int>(b), params.num_parts = static_cast<int>(parts);
  params.min_piece_blocks = rows > 16 ? 2 : 1;  // few rows make small partial results
  // Where they are small, or most requests are split anyway, even parts are worth more than a piece less.
  params.snap_blocks = rows <= 16 || (rows <= kRowTile && 2 * b <= parts) ? 0 : kSnapBlocks;
  launch_plan(params, current_stream(seqlens.device));
  return {schedule, num_splits};
}

std::string dense_decode_why_not(int64_t compute_capability, int64_t scalar_type, int64_t b, int64_t s_q, int64_t h_q,
                                 int64_t h_kv, int64_t d_qk, int64_t d_v, int64_t page_block_size,
                                 double softmax_scale) {
  const DenseDecodeProblem problem{static_cast<int>(compute_capability),
                                   scalar_type == 0   ? Element::kBFloat16
                                   : scalar_type == 1 ? Element::kFloat16
                                                      : Element::kOther,
                                   static_cast<int>(b),
                                   static_cast<int>(s_q),
                                   static_cast<int>(h_q),
                                   static_cast<int>(h_kv),
                                   static_cast<int>(d_qk),
                                   static_cast<int>(d_v),
                                   static_cast<int>(page_block_size),
                                   static_cast<float>(softmax_scale)};
  return explain(dense_decode_kernels(), problem);
}

}  // namespace flash_mla::api
