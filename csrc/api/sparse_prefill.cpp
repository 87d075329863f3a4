// Sparse prefill: checks, problem and parameters, choice of a kernel, launch. Each query token is a request whose whole
// list is one piece of work, so nothing is split.
#include "api/sparse_prefill.h"

#include <algorithm>
#include <cmath>

#include "any/kernels.h"
#include "api/decode.h"
#include "api/device.h"
#include "api/kv_cache.h"
#include "api/kv_format.h"
#include "api/sparse_keys.h"
#include "api/tables.h"

namespace flash_mla::api {
namespace {

// What copies of a call's rows may take.
constexpr int64_t kMostCopiedBytes = int64_t{256} << 20;

// Rows [s_kv, h_kv, d_qk] as a cache of pages of one row; a cache as it is.
Tensor as_cache(const Tensor& rows) {
  if (rows.dim() != 3) {
    return rows;
  }
  const int64_t sizes[4] = {rows.size(0), 1, rows.size(1), rows.size(2)},
                strides[4] = {rows.stride(0), rows.stride(0), rows.stride(1), rows.stride(2)};
  AtenTensorHandle handle = nullptr;
  check(aoti_torch__reinterpret_tensor(rows.get(), 4, sizes, strides, 0, &handle) == 0, ErrorKind::kCuda,
        "torch could not make a view");
  return Tensor(handle);
}

// Rows of 16-bit values whose address or strides are no multiples of 16 bytes, which is how kernels move them, as a
// copy, if it is not too large; other rows as they are.
Tensor with_aligned_rows(const Tensor& rows) {
  if (scalar_type(rows) != ScalarType::BFloat16 || rows.dim() != 4 || !rows.is_cuda()) {
    return rows;
  }
  bool aligned = reinterpret_cast<uintptr_t>(rows.data_ptr()) % 16 == 0;
  for (int d = 0; d < 2; ++d) {
    aligned &= rows.size(d) <= 1 || rows.stride(d) % 8 == 0;
  }
  if (aligned || 2 * rows.numel() > kMostCopiedBytes) {
    return rows;
  }
  const OnDevice on_device(static_cast<int>(rows.get_device_index()));
  Tensor copy = empty(static_cast<int>(rows.get_device_index()), ScalarType::BFloat16,
                      {rows.size(0), rows.size(1), rows.size(2), rows.size(3)});
  return torch::stable::copy_(copy, rows);
}

// The rows that each token selects: a cache, int32 indices [s_q, 1, topk], lengths [s_q].
struct Selection {
  Tensor rows;
  View cache, indices;
  std::optional<View> lengths;
  KVFormat format;

  Selection(const char* name, const Tensor& kv, const char* indices_name, const Tensor& indices_,
            const char* lengths_name, const std::optional<Tensor>& lengths_, KVFormat format_, const View& q)
      : rows(with_aligned_rows(as_cache(kv))),
        cache(name, rows),
        indices(indices_name, indices_),
        lengths(optional_view(lengths_name, lengths_)),
        format(format_) {
    check_rows(cache, format, q);
    check_dim(indices, 3, "[s_q, h_kv = 1, topk]");
    check_size(indices, 0, q.size(0), "[s_q, h_kv = 1, topk]");
    check_size(indices, 1, 1, "[s_q, h_kv = 1, topk]");
    check(indices.size(2) > 0 && indices.size(2) <= kMostKeys, ErrorKind::kValue, indices.name,
          " must name at least one row per token and fewer than 2^31, got ", ShapeText{indices});
    check_dtype(indices, ScalarType::Int);
    check_device(indices, q.device);
    check_contiguous_last(indices);
    if (lengths) {
      check_dim(*lengths, 1, "[s_q]");
      check_size(*lengths, 0, q.size(0), "[s_q]");
      check_dtype(*lengths, ScalarType::Int);
      check_device(*lengths, q.device);
    }
  }

  int64_t slots() const { return cache.size(0) * cache.size(1); }

  void dequantize() {
    rows = dequantized(cache, format);
    cache = View(cache.name, rows);
    format = KVFormat::kBf16;
  }

  KeySource source() const {
    KeySource source = source_of_cache(cache);
    source.indices = static_cast<const int32_t*>(indices.data);
    source.stride_indices_s = indices.stride(0);
    source.topk = static_cast<int>(indices.size(2));
    if (lengths) {
      source.lengths = static_cast<const int32_t*>(lengths->data);
      source.stride_lengths_s = lengths->stride(0);
    }
    return source;
  }
};

void check_query(const View& q) {
  check(q.device >= 0, ErrorKind::kValue, "q must be on CUDA");
  check_dim(q, 3, "[s_q, h_q, d_qk]");
  check_dtype(q, ScalarType::BFloat16);
  check(q.size(2) == 576 || q.size(2) == 512, ErrorKind::kValue, "q must have d_qk 576 or 512, got ", ShapeText{q});
  constexpr int64_t kMaxRows = int64_t{1} << 30;
  check(q.size(1) > 0 && q.size(1) < kMaxRows && q.size(0) < kMaxRows, ErrorKind::kValue,
        "q must have at least one head and fewer than 2^30 tokens and heads, got ", ShapeText{q});
  check_contiguous_last(q);
}

void check_options(double sm_scale, const Name& lse_base) {
  check(std::isfinite(sm_scale), ErrorKind::kValue, "sm_scale must be finite, got ", sm_scale);
  check(lse_base.view() == "2" || lse_base.view() == "e", ErrorKind::kValue, "return_lse_base must be e or 2, got ",
        lse_base.view());
}

struct Call {
  View q;
  std::optional<View> sink;
  std::optional<Selection> keys, extra;
  double sm_scale;
  bool lse_base2;

  Call(const Tensor& q_, const Tensor& kv, const Tensor& indices, const std::optional<Tensor>& topk_length,
       const std::optional<Tensor>& extra_k_cache, const std::optional<Tensor>& extra_indices,
       const std::optional<Tensor>& extra_topk_length, const std::optional<Tensor>& attn_sink, const Name& kv_format,
       const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale_, const Name& lse_base)
      : q("q", q_),
        sink(optional_view("attn_sink", attn_sink)),
        sm_scale(sm_scale_),
        lse_base2(lse_base.view() == "2") {
    check_query(q);
    check(d_v >= 1 && d_v <= q.size(2), ErrorKind::kValue, "d_v must be 1 to d_qk = ", q.size(2), ", got ", d_v);
    check_options(sm_scale, lse_base);
    if (sink) {
      check_sink(*sink, q.size(1), q.device);
    }
    const KVFormat format = format_of("kv_format", kv_format);
    check(extra_k_cache.has_value() == extra_indices.has_value() &&
              extra_k_cache.has_value() == extra_kv_format.has_value() && (extra_k_cache || !extra_topk_length),
          ErrorKind::kValue, "extra_k_cache, extra_indices_in_kvcache and extra_kv_format must come together");
    // Before the keys, which may have to be copied for the kernel.
    problem.compute_capability = device_facts(q.device).compute_capability;
    problem.element = Element::kBFloat16;
    problem.format = format;
    problem.extra_format = extra_kv_format ? format_of("extra_kv_format", *extra_kv_format) : KVFormat::kNone;
    problem.b = 1, problem.s_q = static_cast<int>(q.size(0)), problem.h_q = static_cast<int>(q.size(1));
    problem.d_qk = static_cast<int>(q.size(2)), problem.d_v = static_cast<int>(std::max<int64_t>(d_v, kHeadDimV));
    problem.softmax_scale = static_cast<float>(sm_scale);
    kernel = &select("sparse_prefill", sparse_attention_kernels(), problem);
    check_aligned(q, 2);
    keys.emplace("kv", kv, "indices", indices, "topk_length", topk_length, format, q);
    if (extra_k_cache) {
      extra.emplace("extra_k_cache", *extra_k_cache, "extra_indices_in_kvcache", *extra_indices, "extra_topk_length",
                    extra_topk_length, problem.extra_format, q);
    }
  }

  // Rows of FP8 caches are converted as often as they are selected. Where that is often enough, a copy of the whole
  // cache costs less, and so does the kernel over bfloat16 rows, with the same values. Up to 32 heads the kernel is
  // limited by the bytes that it gathers, and FP8 rows have fewer.
  void dequantize_if_cheaper() {
    constexpr int64_t kWorthACopy = 8, kFewHeads = 32;
    const int64_t slots = keys->slots() + (extra ? extra->slots() : 0),
                  selected = q.size(0) * (keys->indices.size(2) + (extra ? extra->indices.size(2) : 0));
    if (problem.format == KVFormat::kBf16 || problem.h_q <= kFewHeads || slots > selected / kWorthACopy ||
        slots > kMostCopiedBytes / (2 * problem.d_qk)) {
      return;
    }
    keys->dequantize();
    problem.format = KVFormat::kBf16;
    if (extra) {
      extra->dequantize();
      problem.extra_format = KVFormat::kBf16;
    }
    kernel = &select("sparse_prefill", sparse_attention_kernels(), problem);
  }

  // Kernels write all 512 columns, 16 bytes at a time: where `out` has other rows, somewhere else first.
  void run_into(const Tensor& out, const View& max_logits, const View& lse) const {
    const View view("out", out);
    const bool aligned = reinterpret_cast<uintptr_t>(view.data) % 16 == 0 &&
                         (view.size(0) <= 1 || view.stride(0) % 8 == 0) &&
                         (view.size(1) <= 1 || view.stride(1) % 8 == 0);
    if (view.size(2) == kHeadDimV && aligned) {
      run(view, max_logits, lse);
      return;
    }
    Tensor wide = empty(q.device, ScalarType::BFloat16, {view.size(0), view.size(1), int64_t{kHeadDimV}});
    run(View("out", wide), max_logits, lse);
    Tensor destination = out;
    const int64_t sizes[3] = {view.size(0), view.size(1), view.size(2)},
                  strides[3] = {wide.stride(0), wide.stride(1), 1};
    torch::stable::copy_(
        destination, torch::stable::from_blob(wide.data_ptr(), sizes, strides, wide.device(), ScalarType::BFloat16));
  }

  void run(const View& out, const View& max_logits, const View& lse) const {
    if (q.size(0) == 0) {
      return;
    }
    SparseAttentionParams params{};
    params.q = q.data;
    params.attn_sink = sink ? static_cast<const float*>(sink->data) : nullptr;
    params.out = out.data;
    params.lse = static_cast<float*>(lse.data);
    params.max_logits = static_cast<float*>(max_logits.data);
    params.stride_q_s = q.stride(0), params.stride_q_h = q.stride(1);
    params.stride_out_s = out.stride(0), params.stride_out_h = out.stride(1);
    params.stride_lse_s = lse.stride(0), params.stride_lse_h = lse.stride(1);
    params.b = 1;
    params.s_q = params.tokens_per_batch = params.num_requests_total = static_cast<int>(q.size(0));
    params.h_q = params.unit_rows = static_cast<int>(q.size(1));
    params.num_units = params.partial_units = 1;
    params.unit_tiles = ceil_div(params.unit_rows, kRowTile);
    params.max_cuts = 1;
    params.num_sms = device_facts(q.device).num_sms;
    params.scale_log2 = scale_log2_of(sm_scale);
    params.lse_base2 = lse_base2;
    params.keys[0] = keys->source();
    if (extra) {
      params.keys[1] = extra->source();
    }
    launch_fixed_cuts(*kernel, params, 0, params.s_q, choose_requests_at_once(params.unit_tiles, 1, params.num_sms),
                      current_stream(q.device));
  }

  SparseAttentionProblem problem{};
  const SparseKernel* kernel = nullptr;
};

constexpr char kBackwardOp[] = "sparse_prefill_backward";

// Rows that TMA can load: 16-byte aligned, none of them twice. Others as a copy.
Tensor with_rows_for_tma(const char* name, const Tensor& rows) {
  const View view(name, rows);
  bool fits = reinterpret_cast<uintptr_t>(view.data) % 16 == 0;
  for (int d = 0; d < 2; ++d) {
    fits &= view.size(d) <= 1 || (view.stride(d) > 0 && view.stride(d) % 8 == 0);
  }
  if (fits) {
    return rows;
  }
  Tensor copy = empty(view.device, view.dtype, {view.size(0), view.size(1), view.size(2)});
  return torch::stable::copy_(copy, rows);
}

// What the forward gave, and the gradients of it.
void check_results(const View& d_out, const View& d_lse, const View& out, const View& lse, const View& q) {
  for (const View* rows : {&d_out, &out}) {
    check_dim(*rows, 3, "[s_q, h_q, 512]");
    check_size(*rows, 0, q.size(0), "[s_q, h_q, 512]");
    check_size(*rows, 1, q.size(1), "[s_q, h_q, 512]");
    check_size(*rows, 2, kHeadDimV, "[s_q, h_q, 512]");
    check_dtype(*rows, ScalarType::BFloat16);
    check_device(*rows, q.device);
    check_contiguous_last(*rows);
  }
  check_aligned(out, 2);
  for (const View* rows : {&d_lse, &lse}) {
    check_dim(*rows, 2, "[s_q, h_q]");
    check_size(*rows, 0, q.size(0), "[s_q, h_q]");
    check_size(*rows, 1, q.size(1), "[s_q, h_q]");
    check_dtype(*rows, ScalarType::Float);
    check_device(*rows, q.device);
  }
}

SparseAttentionProblem backward_problem(int compute_capability, KVFormat format, KVFormat extra_format, int64_t h_q,
                                        int64_t d_qk, int64_t d_v, double sm_scale) {
  SparseAttentionProblem problem{};
  problem.compute_capability = compute_capability;
  problem.element = Element::kBFloat16;
  problem.format = format, problem.extra_format = extra_format;
  problem.h_q = static_cast<int>(h_q), problem.d_qk = static_cast<int>(d_qk), problem.d_v = static_cast<int>(d_v);
  problem.softmax_scale = static_cast<float>(sm_scale);
  return problem;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> sparse_prefill(const Tensor& q, const Tensor& kv, const Tensor& indices,
                                                  const std::optional<Tensor>& topk_length,
                                                  const std::optional<Tensor>& extra_k_cache,
                                                  const std::optional<Tensor>& extra_indices,
                                                  const std::optional<Tensor>& extra_topk_length,
                                                  const std::optional<Tensor>& attn_sink, const Name& kv_format,
                                                  const std::optional<Name>& extra_kv_format, int64_t d_v,
                                                  double sm_scale, const Name& lse_base, bool /*deterministic*/) {
  Call call(q, kv, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length, attn_sink, kv_format,
            extra_kv_format, d_v, sm_scale, lse_base);
  const OnDevice on_device(call.q.device);
  call.dequantize_if_cheaper();
  const int64_t s_q = call.q.size(0), h_q = call.q.size(1);
  Tensor out = empty(call.q.device, ScalarType::BFloat16, {s_q, h_q, d_v});
  Tensor max_logits = empty(call.q.device, ScalarType::Float, {s_q, h_q});
  Tensor lse = empty(call.q.device, ScalarType::Float, {s_q, h_q});
  call.run_into(out, View("max_logits", max_logits), View("lse", lse));
  return {out, max_logits, lse};
}

void sparse_prefill_out(const Tensor& q, const Tensor& kv, const Tensor& indices,
                        const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
                        const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
                        const std::optional<Tensor>& attn_sink, const Name& kv_format,
                        const std::optional<Name>& extra_kv_format, int64_t d_v, double sm_scale, const Name& lse_base,
                        bool /*deterministic*/, const Tensor& out, const Tensor& max_logits, const Tensor& lse) {
  Call call(q, kv, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length, attn_sink, kv_format,
            extra_kv_format, d_v, sm_scale, lse_base);
  const OnDevice on_device(call.q.device);
  call.dequantize_if_cheaper();
  const View out_view("out", out), maximum_view("max_logits", max_logits), lse_view("lse", lse);
  const int64_t s_q = call.q.size(0), h_q = call.q.size(1);
  check_dim(out_view, 3, "[s_q, h_q, d_v]");
  check_size(out_view, 0, s_q, "[s_q, h_q, d_v]");
  check_size(out_view, 1, h_q, "[s_q, h_q, d_v]");
  check_size(out_view, 2, d_v, "[s_q, h_q, d_v]");
  check_dtype(out_view, ScalarType::BFloat16);
  check_device(out_view, call.q.device);
  check_contiguous_last(out_view);
  for (const View& rows : {maximum_view, lse_view}) {
    check_dim(rows, 2, "[s_q, h_q]");
    check_size(rows, 0, s_q, "[s_q, h_q]");
    check_size(rows, 1, h_q, "[s_q, h_q]");
    check_dtype(rows, ScalarType::Float);
    check_device(rows, call.q.device);
  }
  check((s_q <= 1 || maximum_view.stride(0) == lse_view.stride(0)) &&
            (h_q <= 1 || maximum_view.stride(1) == lse_view.stride(1)),
        ErrorKind::kValue, "max_logits must have the strides of lse");
  call.run_into(out, maximum_view, lse_view);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sparse_prefill_backward(
    const Tensor& d_out_, const Tensor& d_lse_, const Tensor& q_, const Tensor& kv, const Tensor& indices,
    const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
    const std::optional<Tensor>& /*extra_indices*/, const std::optional<Tensor>& /*extra_topk_length*/,
    const std::optional<Tensor>& attn_sink, const Name& kv_format, const std::optional<Name>& extra_kv_format,
    double sm_scale, const Name& lse_base, bool deterministic, const Tensor& out_, const Tensor& lse_) {
  const View given("q", q_), d_lse("d_lse", d_lse_), out("out", out_), lse("lse", lse_);
  check_query(given);
  check_options(sm_scale, lse_base);
  const std::optional<View> sink = optional_view("attn_sink", attn_sink);
  if (sink) {
    check_sink(*sink, given.size(1), given.device);
  }
  const View d_out_given("d_out", d_out_);
  check_dim(d_out_given, 3, "[s_q, h_q, d_v]");
  const KVFormat format = format_of("kv_format", kv_format),
                 extra_format = extra_kv_format ? format_of("extra_kv_format", *extra_kv_format) : KVFormat::kNone;
  check(extra_k_cache.has_value() == extra_kv_format.has_value(), ErrorKind::kValue,
        "extra_k_cache and extra_kv_format must come together");
  const OnDevice on_device(given.device);
  const DeviceFacts& facts = device_facts(given.device);
  const auto& kernel = select(kBackwardOp, sparse_prefill_backward_kernels(),
                              backward_problem(facts.compute_capability, format, extra_format, given.size(1),
                                               given.size(2), d_out_given.size(2), sm_scale));
  check_results(d_out_given, d_lse, out, lse, given);
  const Tensor q_rows = with_rows_for_tma("q", q_), d_out_rows = with_rows_for_tma("d_out", d_out_);
  const View q("q", q_rows), d_out("d_out", d_out_rows);
  const Selection selection("kv", kv, "indices", indices, "topk_length", topk_length, format, q);
  const int64_t s_q = q.size(0), h_q = q.size(1), d_qk = q.size(2), slots = selection.slots();
  check(slots <= INT32_MAX, ErrorKind::kUnsupported, kBackwardOp, " takes fewer than 2^31 rows of kv, got ", slots);
  Tensor dq = empty(q.device, ScalarType::BFloat16, {s_q, h_q, d_qk});
  Tensor dkv = kv.dim() == 3
                   ? empty(q.device, ScalarType::BFloat16, {slots, 1, d_qk})
                   : empty(q.device, ScalarType::BFloat16, {selection.cache.size(0), selection.cache.size(1), 1, d_qk});
  Tensor d_extra = empty(q.device, ScalarType::BFloat16, {0});
  Tensor d_sink = empty(q.device, ScalarType::Float, {sink ? h_q : 0});

  Tensor rows = empty(q.device, ScalarType::Float, {s_q, h_q, int64_t{sizeof(BackwardRow) / sizeof(float)}});
  // Sums in fixed point have 8 bytes.
  Tensor sums = empty(q.device, ScalarType::Float, {slots, d_qk * (deterministic ? 2 : 1)});
  constexpr int64_t kBoundsWords = sizeof(BackwardBounds) / sizeof(int32_t);
  Tensor per_slot = empty(q.device, ScalarType::Int, {deterministic ? 3 * slots + kBoundsWords : 0});

  SparsePrefillBackwardParams params{};
  params.q = q.data, params.d_out = d_out.data, params.out = out.data;
  params.lse = static_cast<const float*>(lse.data), params.d_lse = static_cast<const float*>(d_lse.data);
  params.attn_sink = sink ? static_cast<const float*>(sink->data) : nullptr;
  params.keys = selection.source();
  params.dq = dq.data_ptr(), params.dkv = dkv.data_ptr();
  params.d_sink = sink ? static_cast<float*>(d_sink.data_ptr()) : nullptr;
  params.rows = static_cast<BackwardRow*>(rows.data_ptr());
  if (deterministic) {
    auto* words = static_cast<int32_t*>(per_slot.data_ptr());
    params.fixed = {static_cast<int64_t*>(sums.data_ptr()), words + kBoundsWords,
                    reinterpret_cast<float*>(words + kBoundsWords + slots), words + kBoundsWords + 2 * slots,
                    reinterpret_cast<BackwardBounds*>(words)};
  } else {
    params.sums = static_cast<float*>(sums.data_ptr());
  }
  params.stride_q_s = q.stride(0), params.stride_q_h = q.stride(1);
  params.stride_out_s = out.stride(0), params.stride_out_h = out.stride(1);
  params.stride_lse_s = lse.stride(0), params.stride_lse_h = lse.stride(1);
  params.stride_do_s = d_out.stride(0), params.stride_do_h = d_out.stride(1);
  params.stride_dlse_s = d_lse.stride(0), params.stride_dlse_h = d_lse.stride(1);
  params.s_q = static_cast<int>(s_q), params.h_q = static_cast<int>(h_q), params.d_qk = static_cast<int>(d_qk);
  params.head_blocks = ceil_div(params.h_q, kRowTile);
  params.num_sms = facts.num_sms;
  params.softmax_scale = static_cast<float>(sm_scale), params.scale_log2 = scale_log2_of(sm_scale);
  params.lse_base2 = lse_base.view() == "2";
  void* stream = current_stream(q.device);
  launch_sparse_backward_prepare(params, stream);
  if (s_q > 0) {
    kernel.launch(params, stream);
  }
  launch_sparse_backward_finish(params, stream);
  return {dq, dkv, d_extra, d_sink};
}

std::string sparse_prefill_backward_why_not(int64_t compute_capability, int64_t kv_format, int64_t extra_kv_format,
                                            int64_t h_q, int64_t d_qk, int64_t d_v, double sm_scale) {
  constexpr int64_t kNone = static_cast<int64_t>(KVFormat::kNone);
  check(std::min(kv_format, extra_kv_format) >= 0 && std::max(kv_format, extra_kv_format) <= kNone, ErrorKind::kValue,
        "kv_format and extra_kv_format must be in 0 to ", kNone, ", got ", kv_format, " and ", extra_kv_format);
  return explain(sparse_prefill_backward_kernels(),
                 backward_problem(static_cast<int>(compute_capability), static_cast<KVFormat>(kv_format),
                                  static_cast<KVFormat>(extra_kv_format), h_q, d_qk, d_v, sm_scale));
}

}  // namespace flash_mla::api
