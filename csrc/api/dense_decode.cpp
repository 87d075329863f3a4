// Dense MLA decode: checks, problem and parameters, choice of a kernel, launch.
#include "api/dense_decode.h"

#include <algorithm>
#include <bit>
#include <cfloat>
#include <cmath>

#include "any/kernels.h"
#include "api/device.h"
#include "api/tensor.h"
#include "sm90/kernels.h"

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
  check(head_dim_v == kHeadDimV, ErrorKind::kValue, "head_dim_v must be 512, got ", head_dim_v);
  check(std::isfinite(softmax_scale), ErrorKind::kValue, "softmax_scale must be finite, got ", softmax_scale);
  check_contiguous_last(q);
  check_contiguous_last(k);
  check_dim(table, 2, "[b, max_blocks]");
  check_size(table, 0, s.b, "[b, max_blocks]");
  check_dtype(table, ScalarType::Int);
  check_device(table, q.device);
  check_contiguous_last(table);
  check_dim(seqlens, 1, "[b]");
  check_size(seqlens, 0, s.b, "[b]");
  check_dtype(seqlens, ScalarType::Int);
  check_device(seqlens, q.device);
  check(seqlens.stride(0) == 1 || s.b <= 1, ErrorKind::kValue, "cache_seqlens must be contiguous");
  check(table.size(1) * s.page <= INT32_MAX - kScheduleBlock, ErrorKind::kValue,
        "block_table must cover fewer than 2^31 keys per request, got ", ShapeText{table}, " pages of ", s.page);
  constexpr int64_t kMaxRows = int64_t{1} << 30;
  check(s.b < kMaxRows && s.s_q * s.h_q < kMaxRows, ErrorKind::kValue,
        "q must have fewer than 2^30 requests and rows per request, got ", ShapeText{q});
  check_aligned(q, 2);
  check_aligned(k, 2);
  return s;
}

void check_schedule(const View& schedule, const View& num_splits, int64_t b, int device) {
  check_dim(schedule, 2, "[num_sm_parts, 8]");
  check_size(schedule, 1, 8, "[num_sm_parts, 8]");
  check_dtype(schedule, ScalarType::Int);
  check_device(schedule, device);
  check(schedule.size(0) > 0 && schedule.size(0) < 65536, ErrorKind::kValue,
        "tile_scheduler_metadata must have 1 to 65535 rows, got ", schedule.size(0));
  check(schedule.stride(1) == 1 && (schedule.stride(0) == 8 || schedule.size(0) == 1), ErrorKind::kValue,
        "tile_scheduler_metadata must be contiguous");
  check_dim(num_splits, 1, "[b + 1]");
  check_size(num_splits, 0, b + 1, "[b + 1]");
  check_dtype(num_splits, ScalarType::Int);
  check_device(num_splits, device);
  check(num_splits.stride(0) == 1, ErrorKind::kValue, "num_splits must be contiguous");
}

void check_outputs(const View& out, const View& lse, const View& q, const Shapes& s) {
  check_dim(out, 4, "[b, s_q, h_q, 512]");
  check_size(out, 0, s.b, "[b, s_q, h_q, 512]");
  check_size(out, 1, s.s_q, "[b, s_q, h_q, 512]");
  check_size(out, 2, s.h_q, "[b, s_q, h_q, 512]");
  check_size(out, 3, kHeadDimV, "[b, s_q, h_q, 512]");
  check_dtype(out, q.dtype);
  check_device(out, q.device);
  check_contiguous_last(out);
  check_aligned(out, 2);
  check_dim(lse, 3, "[b, h_q, s_q]");
  check_size(lse, 0, s.b, "[b, h_q, s_q]");
  check_size(lse, 1, s.h_q, "[b, h_q, s_q]");
  check_size(lse, 2, s.s_q, "[b, h_q, s_q]");
  check_dtype(lse, ScalarType::Float);
  check_device(lse, q.device);
}

// Memory for partial results: the accumulators, then their log-sum-exps.
Tensor allocate_partials(int device, DenseDecodeParams& params, int64_t num_partials) {
  const int64_t rows = num_partials * params.h_kv * params.num_row_tiles * kRowTile;
  Tensor memory = empty(device, ScalarType::Float, {rows * (kHeadDimV + 1)});
  params.partial_out = static_cast<float*>(memory.data_ptr());
  params.partial_lse = params.partial_out + rows * kHeadDimV;
  return memory;
}

// Pieces per request in the batch-invariant mode: what fits into the bound on partial results for a single request. It
// depends on the request's own shape only.
int choose_max_cuts(int64_t tiles_per_request, int num_sms) {
  const int64_t fits = kPartialsPerPart * num_sms / tiles_per_request;
  return static_cast<int>(fits < 1 ? 1 : fits > kMaxCuts ? kMaxCuts : fits);
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
  const auto& kernel = select(kOp, sm90::dense_decode_kernels(), problem);
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
  params.page_shift = std::has_single_bit(static_cast<unsigned>(params.page))
                          ? std::countr_zero(static_cast<unsigned>(params.page))
                          : -1;
  // Masked scores are -inf, and -inf * 0 is no number: a scale of 0 becomes one that makes no difference.
  params.scale_log2 = softmax_scale == 0 ? FLT_MIN : static_cast<float>(softmax_scale * 1.4426950408889634);
  params.causal = causal;
  params.element = problem.element;
  params.num_sms = facts.num_sms;
  void* stream = current_stream(q.device);
  const int64_t tiles_per_part = static_cast<int64_t>(params.h_kv) * params.num_row_tiles;

  if (batch_invariant) {
    params.max_cuts = choose_max_cuts(tiles_per_part, facts.num_sms);
    const int64_t at_once =
        params.max_cuts == 1
            ? std::max<int64_t>(std::min(s.b, INT32_MAX / tiles_per_part), 1)
            : std::max<int64_t>(kPartialsPerPart * facts.num_sms / (tiles_per_part * params.max_cuts), 1);
    std::optional<Tensor> partials;
    if (params.max_cuts > 1) {
      partials = allocate_partials(q.device, params, std::min(at_once, s.b) * params.max_cuts);
    }
    for (int64_t first = 0; first < s.b; first += at_once) {
      params.first_request = static_cast<int>(first);
      params.num_requests = static_cast<int>(std::min(at_once, s.b - first));
      params.num_parts = params.num_requests * params.max_cuts;
      kernel.launch(params, stream);
      if (params.max_cuts > 1) {
        launch_combine(params, stream);
      }
    }
    return;
  }
  check(schedule && num_splits, ErrorKind::kValue,
        "tile_scheduler_metadata and num_splits must be given, unless enable_batch_invariant is True");
  params.schedule = static_cast<const ScheduleRow*>(schedule->data);
  params.num_splits = static_cast<const int32_t*>(num_splits->data);
  params.num_parts = static_cast<int>(schedule->size(0));
  std::optional<Tensor> partials;
  if (params.num_parts > 1) {
    partials = allocate_partials(q.device, params, static_cast<int64_t>(kPartialsPerPart) * params.num_parts);
  }
  kernel.launch(params, stream);
  if (params.num_parts > 1) {
    launch_combine(params, stream);
  }
}

std::optional<View> optional_view(const char* name, const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<View>(View(name, *tensor)) : std::nullopt;
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
      check_dim(*sink, 1, "[h_q]");
      check_size(*sink, 0, shapes.h_q, "[h_q]");
      check_dtype(*sink, ScalarType::Float);
      check_device(*sink, q.device);
      check_contiguous_last(*sink);
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
  const torch::stable::accelerator::DeviceGuard guard(call.q.device);
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
  const torch::stable::accelerator::DeviceGuard guard(call.q.device);
  const View out_view("out", out), lse_view("lse", lse);
  check_outputs(out_view, lse_view, call.q, call.shapes);
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
  const torch::stable::accelerator::DeviceGuard guard(seqlens.device);
  check_built_for("plan_dense_decode", seqlens.device);
  const int64_t b = seqlens.size(0), parts = num_sm_parts(seqlens.device, s_q, h_q, h_kv);
  Tensor schedule = empty(seqlens.device, ScalarType::Int, {parts, 8});
  Tensor num_splits = empty(seqlens.device, ScalarType::Int, {b + 1});
  const int64_t rows = s_q * (h_q / h_kv);
  launch_plan({static_cast<const int32_t*>(seqlens.data), static_cast<ScheduleRow*>(schedule.data_ptr()),
               static_cast<int32_t*>(num_splits.data_ptr()), static_cast<int>(b), static_cast<int>(parts),
               static_cast<int>(rows < kRowTile ? rows : kRowTile)},
              current_stream(seqlens.device));
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
  return explain(sm90::dense_decode_kernels(), problem);
}

}  // namespace flash_mla::api
