// Dense MLA decode over FP8 caches, by sparse attention's kernels with the block table as the source of keys: checks,
// problem and parameters, choice of a kernel, launch.
#include "api/dense_decode_fp8.h"

#include "api/sparse_call.h"

namespace flash_mla::api {
namespace {

// ---- Keys by block table.

struct TableCall {
  SparseCommon common;
  View cache, table, seqlens;
  std::optional<View> descale_q, descale_k;
  KVFormat format;
  bool causal;

  TableCall(const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
            const std::optional<Tensor>& schedule, const std::optional<Tensor>& num_splits,
            const std::optional<Tensor>& sink, int64_t head_dim_v, double softmax_scale, bool causal_,
            bool batch_invariant, const std::optional<Tensor>& descale_q_, const std::optional<Tensor>& descale_k_,
            const std::optional<Name>& kv_format)
      : common(q, schedule, num_splits, sink, head_dim_v, softmax_scale, batch_invariant),
        cache("k_cache", k_cache),
        table("block_table", block_table),
        seqlens("cache_seqlens", cache_seqlens),
        descale_q(optional_view("descale_q", descale_q_)),
        descale_k(optional_view("descale_k", descale_k_)),
        format(kv_format                ? format_of("kv_format", *kv_format)
               : q.size(3) == kHeadDimV ? KVFormat::kE4m3NoRope
                                        : KVFormat::kE4m3),
        causal(causal_) {
    const View& view = common.q;
    const bool fp8_query = view.dtype == ScalarType::Float8_e4m3fn;
    check(fp8_query || view.dtype == ScalarType::BFloat16, ErrorKind::kType,
          "q must have dtype BFloat16 or Float8_e4m3fn, got ", dtype_text(view.dtype));
    check(fp8_query == descale_q.has_value(), ErrorKind::kValue,
          "descale_q must be given with an FP8 q, and only then");
    check(kv_format.has_value() != descale_k.has_value(), ErrorKind::kValue,
          "descale_k must be given without a kv_format, and only then");
    check(format != KVFormat::kBf16 && format != KVFormat::kV41Fp4, ErrorKind::kValue,
          "kv_format must be an FP8 format in a dense call");
    check_dim(cache, 4, "[num_blocks, page, h_kv, d_qk or bytes per token]");
    check_paging(table, seqlens, view.size(0), cache.size(1), view.device);
    for (const auto& descale : {descale_q, descale_k}) {
      if (descale) {
        check_dtype(*descale, ScalarType::Float);
        check_device(*descale, view.device);
        int64_t numbers = 1;
        for (int d = 0; d < descale->dim; ++d) {
          numbers *= descale->size(d);
        }
        check(numbers == 1, ErrorKind::kValue, descale->name, " must be one number, got ", ShapeText{*descale});
      }
    }
  }

  void run(const View& out, const View& lse) const {
    const View& q = common.q;
    const DeviceFacts& facts = device_facts(q.device);
    SparseAttentionProblem problem = common.problem(facts, format);
    problem.from_table = true;
    const bool fp8_query = q.dtype == ScalarType::Float8_e4m3fn;
    if (fp8_query && has_one_scale(format)) {
      problem.element = Element::kBFloat16;  // as which kernels get it
    }
    problem.h_kv = static_cast<int>(cache.size(2));
    problem.page = static_cast<int>(cache.size(1));
    problem.topk = static_cast<int>(table.size(1) * cache.size(1));
    // Before the checks of the cache: those are for the formats that kernels know.
    const SparseKernel& kernel = select("dense_decode_fp8", sparse_attention_kernels(), problem);
    check_aligned(q, fp8_query ? 1 : 2);
    check_rows(cache, format, q);
    if (problem.b == 0) {
      return;
    }
    void* stream = current_stream(q.device);
    SparseAttentionParams params = common.params(facts, out, lse);
    params.descale_q = descale_q ? static_cast<const float*>(descale_q->data) : nullptr;
    params.descale_k = descale_k ? static_cast<const float*>(descale_k->data) : nullptr;
    std::optional<Tensor> wide;
    if (fp8_query) {
      wide = widen_query(params, stream);
    }
    KeySource& keys = params.keys[0];
    keys = source_of_cache(cache);
    keys.indices = static_cast<const int32_t*>(table.data);
    keys.lengths = static_cast<const int32_t*>(seqlens.data);
    keys.stride_indices_b = table.stride(0), keys.stride_lengths_b = seqlens.stride(0);
    keys.topk = problem.topk;
    params.num_units = params.partial_units = 1;
    params.unit_rows = params.s_q * params.h_q;
    params.unit_tiles = ceil_div(params.unit_rows, kRowTile);
    params.from_table = true;
    params.causal = causal;
    if (!common.batch_invariant) {
      launch_scheduled(kernel, params, common.schedule, common.num_splits, params.unit_tiles, q.device, stream);
      return;
    }
    std::optional<Tensor> partials;
    const int64_t at_once = prepare_fixed_cuts(kernel, params, q.device, partials);
    launch_fixed_cuts(kernel, params, 0, params.b, at_once, stream);
  }

  // The memory of a copy of q in bfloat16, which `params` get.
  Tensor widen_query(SparseAttentionParams& params, void* stream) const {
    const View& q = common.q;
    Tensor wide = empty(q.device, ScalarType::BFloat16, {q.size(0), q.size(1), q.size(2), q.size(3)});
    WidenQueryParams widen{};
    widen.q = q.data, widen.wide = wide.data_ptr();
    widen.s_q = params.s_q, widen.h_q = params.h_q, widen.d_qk = static_cast<int>(q.size(3));
    widen.num_rows = static_cast<int64_t>(params.b) * params.s_q * params.h_q;
    widen.stride_b = params.stride_q_b, widen.stride_s = params.stride_q_s, widen.stride_h = params.stride_q_h;
    widen.num_sms = params.num_sms;
    launch_widen_query(widen, stream);
    params.q = widen.wide;
    params.stride_q_h = q.size(3);
    params.stride_q_s = params.stride_q_h * params.h_q;
    params.stride_q_b = params.stride_q_s * params.s_q;
    return wide;
  }
};

}  // namespace

std::tuple<Tensor, Tensor> dense_decode_fp8(
    const Tensor& q, const Tensor& k_cache, const Tensor& block_table, const Tensor& cache_seqlens,
    const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
    const std::optional<Tensor>& attn_sink, int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant,
    const std::optional<Tensor>& descale_q, const std::optional<Tensor>& descale_k,
    const std::optional<Name>& kv_format) {
  return run_into_new(TableCall(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink,
                                head_dim_v, softmax_scale, causal, batch_invariant, descale_q, descale_k, kv_format));
}

void dense_decode_fp8_out(const Tensor& q, const Tensor& k_cache, const Tensor& block_table,
                          const Tensor& cache_seqlens, const std::optional<Tensor>& tile_scheduler_metadata,
                          const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink,
                          int64_t head_dim_v, double softmax_scale, bool causal, bool batch_invariant,
                          const std::optional<Tensor>& descale_q, const std::optional<Tensor>& descale_k,
                          const std::optional<Name>& kv_format, const Tensor& out, const Tensor& lse) {
  run_into(TableCall(q, k_cache, block_table, cache_seqlens, tile_scheduler_metadata, num_splits, attn_sink, head_dim_v,
                     softmax_scale, causal, batch_invariant, descale_q, descale_k, kv_format),
           out, lse);
}

}  // namespace flash_mla::api
