// Sparse MLA decode: checks, problem and parameters, choice of a kernel, how lists are cut, launch.
#include "api/sparse_decode.h"

#include <algorithm>

#include "any/kernels.h"
#include "api/sparse_call.h"

namespace flash_mla::api {
namespace {

// int32 [b] or [b, s_q].
void check_lengths(const View& lengths, int64_t b, int64_t s_q, int device) {
  check_dtype(lengths, ScalarType::Int);
  check_device(lengths, device);
  check((lengths.dim == 1 || (lengths.dim == 2 && lengths.size(1) == s_q)) && lengths.size(0) == b, ErrorKind::kValue,
        lengths.name, " must have shape [b] or [b, s_q], so [", b, "] or [", b, ", ", s_q, "], got ",
        ShapeText{lengths});
}

// A cache and the rows of it that each token selects.
struct Selection {
  View cache, indices;
  std::optional<View> lengths;
  KVFormat format;

  void check_for(const View& q) const {
    check_rows(cache, format, q);
    check_dim(indices, 3, "[b, s_q, topk]");
    check_size(indices, 0, q.size(0), "[b, s_q, topk]");
    check_size(indices, 1, q.size(1), "[b, s_q, topk]");
    check(indices.size(2) > 0 && indices.size(2) <= kMostKeys, ErrorKind::kValue, indices.name,
          " must name at least one slot per token and fewer than 2^31, got ", ShapeText{indices});
    check_dtype(indices, ScalarType::Int);
    check_device(indices, q.device);
    check_contiguous_last(indices);
    if (lengths) {
      check_lengths(*lengths, q.size(0), q.size(1), q.device);
    }
  }
};

KeySource source_of(const Selection& selection) {
  KeySource source = source_of_cache(selection.cache);
  source.indices = static_cast<const int32_t*>(selection.indices.data);
  source.stride_indices_b = selection.indices.stride(0), source.stride_indices_s = selection.indices.stride(1);
  source.topk = static_cast<int>(selection.indices.size(2));
  if (selection.lengths) {
    source.lengths = static_cast<const int32_t*>(selection.lengths->data);
    source.stride_lengths_b = selection.lengths->stride(0);
    source.stride_lengths_s = selection.lengths->dim == 2 ? selection.lengths->stride(1) : 0;
  }
  return source;
}

// The most blocks of a list that an even cut multiplies.
constexpr int kMostEvenBlocks = 1 << 16;

// Where all lists are of one length the host knows as much as a plan's kernel: each is cut into as many pieces as make
// a wave of CTAs, or left whole where there are so many, unless waves that are not full would cost more than a plan
// that cuts anywhere. Lists of various lengths are cut so where they are few, and so short that a piece has two blocks
// at the most. Pieces of one block only where these leave half of the SMs idle, since on those the combine kernel
// waits. False: a plan serves the call better.
bool choose_even_cuts(SparseAttentionParams& params) {
  constexpr int64_t kFewestCuts = 4, kMostTiles = 1 << 24;
  const int64_t tiles = static_cast<int64_t>(params.b) * params.s_q * params.unit_tiles, most = params.num_sms / tiles;
  const int blocks = unit_blocks(params.keys[0].topk, params.keys[1].topk);
  if (tiles > kMostTiles || blocks > kMostEvenBlocks) {
    return false;
  }
  params.min_cut_blocks = 2 * tiles * blocks <= params.num_sms ? 1 : 2;
  params.max_cuts = even_cuts(blocks, static_cast<int>(std::max<int64_t>(most, 1)), params.min_cut_blocks);
  const int longest = ceil_div(blocks, params.max_cuts);
  if (params.keys[0].lengths != nullptr || params.keys[1].lengths != nullptr) {
    return most >= kFewestCuts && longest <= 2;
  }
  const int64_t waves = ceil_div<int64_t>(tiles * params.max_cuts, params.num_sms);
  const int64_t even = waves * (longest + kPieceOverhead) + (params.max_cuts > 1 ? kCombineOverhead : 0);
  const int64_t planned =
      ceil_div<int64_t>(tiles * (blocks + kPieceOverhead), params.num_sms) + kPieceOverhead + kCombineOverhead;
  return most >= kFewestCuts || even <= planned;
}

// Each token is a request of its own.
void launch_evenly_cut(const SparseKernel& kernel, SparseAttentionParams& params, int device, void* stream) {
  const int tokens = params.b * params.s_q;
  params.cut_evenly = true;
  params.tokens_per_batch = params.s_q;
  params.num_requests_total = tokens;
  params.num_units = params.partial_units = 1;
  std::optional<Tensor> partials;
  if (params.max_cuts > 1) {
    partials =
        allocate_partials(kernel, device, static_cast<int64_t>(tokens) * params.max_cuts * params.unit_tiles, params);
  }
  launch_fixed_cuts(kernel, params, 0, tokens, tokens, stream);
}

// What the lists of as many tokens as are compacted at a time may take; a list of the caller's takes as much.
constexpr int64_t kCompactedBytes = int64_t{256} << 20;

// Every token is a request of its own, with lists of the indices that count alone: so its bits depend on nothing else.
void launch_by_token(const SparseKernel& kernel, SparseAttentionParams& params, int device, void* stream) {
  const int64_t tokens = static_cast<int64_t>(params.b) * params.s_q;
  check(tokens <= kMostKeys, ErrorKind::kValue, "q must have fewer than 2^31 tokens with enable_batch_invariant, got ",
        tokens);
  params.tokens_per_batch = params.s_q;
  params.num_requests_total = static_cast<int>(tokens);
  params.num_units = params.partial_units = 1;
  std::optional<Tensor> partials;
  const int64_t at_once = prepare_fixed_cuts(kernel, params, device, partials);

  CompactParams compact{};
  compact.keys[0] = params.keys[0], compact.keys[1] = params.keys[1];
  compact.s_q = params.s_q;
  compact.num_sms = params.num_sms;
  const int64_t width = static_cast<int64_t>(params.keys[0].topk) + params.keys[1].topk + 2;
  const int64_t room = std::clamp<int64_t>(kCompactedBytes / (width * sizeof(int32_t)), 1, tokens);
  Tensor memory = empty(device, ScalarType::Int, {room * width});
  auto* lists = static_cast<int32_t*>(memory.data_ptr());
  for (int i = 0; i < 2; ++i) {
    compact.lengths[i] = lists;
    compact.compacted[i] = lists + room;
    lists += room * (params.keys[i].topk + 1);
  }
  for (int64_t first = 0; first < tokens; first += room) {
    compact.first_token = static_cast<int>(first);
    compact.num_tokens = static_cast<int>(std::min(room, tokens - first));
    launch_compact(compact, stream);
    for (int i = 0; i < 2 && params.keys[i].topk > 0; ++i) {
      // Token t's list is at indices + t * topk, for those t whose lists are there.
      KeySource& keys = params.keys[i];
      keys.indices = compact.compacted[i] - first * keys.topk;
      keys.stride_indices_b = static_cast<int64_t>(params.s_q) * keys.topk, keys.stride_indices_s = keys.topk;
      keys.lengths = compact.lengths[i] - first;
      keys.stride_lengths_b = params.s_q, keys.stride_lengths_s = 1;
    }
    launch_fixed_cuts(kernel, params, first, first + compact.num_tokens, at_once, stream);
  }
}

struct SparseCall {
  SparseCommon common;
  Selection keys;
  std::optional<Selection> extra;

  SparseCall(const Tensor& q, const Tensor& k_cache, const Tensor& indices, const std::optional<Tensor>& topk_length,
             const std::optional<Tensor>& extra_k_cache, const std::optional<Tensor>& extra_indices,
             const std::optional<Tensor>& extra_topk_length, const std::optional<Tensor>& schedule,
             const std::optional<Tensor>& num_splits, const std::optional<Tensor>& sink, const Name& kv_format,
             const std::optional<Name>& extra_kv_format, int64_t head_dim_v, double softmax_scale, bool batch_invariant)
      : common(q, schedule, num_splits, sink, head_dim_v, softmax_scale, batch_invariant),
        keys{View("k_cache", k_cache), View("indices", indices), optional_view("topk_length", topk_length),
             format_of("kv_format", kv_format)} {
    check_dtype(common.q, ScalarType::BFloat16);
    check_aligned(common.q, 2);
    keys.check_for(common.q);
    check(extra_k_cache.has_value() == extra_indices.has_value() &&
              extra_k_cache.has_value() == extra_kv_format.has_value() && (extra_k_cache || !extra_topk_length),
          ErrorKind::kValue, "extra_k_cache, extra_indices_in_kvcache and extra_kv_format must come together");
    if (extra_k_cache) {
      extra.emplace(Selection{View("extra_k_cache", *extra_k_cache), View("extra_indices_in_kvcache", *extra_indices),
                              optional_view("extra_topk_length", extra_topk_length),
                              format_of("extra_kv_format", *extra_kv_format)});
      extra->check_for(common.q);
    }
  }

  void run(const View& out, const View& lse) const {
    const View& q = common.q;
    const DeviceFacts& facts = device_facts(q.device);
    SparseAttentionProblem problem = common.problem(facts, keys.format);
    problem.page = static_cast<int>(keys.cache.size(1)), problem.topk = static_cast<int>(keys.indices.size(2));
    if (extra) {
      problem.extra_format = extra->format;
      problem.extra_page = static_cast<int>(extra->cache.size(1));
      problem.extra_topk = static_cast<int>(extra->indices.size(2));
    }
    // Not in the batch-invariant mode, where b must not choose the kernel.
    problem.few_tiles = !common.batch_invariant && 4 * q.size(0) * q.size(1) * ceil_div<int64_t>(q.size(2), kRowTile) <=
                                                       static_cast<int64_t>(facts.num_sms);
    const SparseKernel& kernel = select("sparse_decode", sparse_attention_kernels(), problem);
    if (problem.b == 0) {
      return;
    }
    SparseAttentionParams params = common.params(facts, out, lse);
    params.keys[0] = source_of(keys);
    if (extra) {
      params.keys[1] = source_of(*extra);
    }
    params.num_units = params.partial_units = params.s_q;
    params.unit_rows = params.h_q;
    params.unit_tiles = ceil_div(params.unit_rows, kRowTile);
    void* stream = current_stream(q.device);
    if (common.batch_invariant) {
      launch_by_token(kernel, params, q.device, stream);
    } else if (kernel.starts_early && common.has_schedule() && choose_even_cuts(params)) {
      launch_evenly_cut(kernel, params, q.device, stream);
    } else {
      launch_scheduled(kernel, params, common.schedule, common.num_splits,
                       static_cast<int64_t>(params.num_units) * params.unit_tiles, q.device, stream);
    }
  }
};

PlannedLengths planned(const char* name, const std::optional<Tensor>& tensor, int64_t b, int64_t s_q, int64_t most,
                       int device) {
  PlannedLengths source{nullptr, 0, 0, 1, static_cast<int>(most)};
  if (tensor) {
    const View lengths(name, *tensor);
    check_lengths(lengths, b, s_q, device);
    source.lengths = static_cast<const int32_t*>(lengths.data);
    source.stride_b = lengths.stride(0);
    if (lengths.dim == 2 && lengths.stride(1) != 0) {
      source.stride_s = lengths.stride(1);
      source.tokens = static_cast<int>(s_q);
    }
  }
  return source;
}

}  // namespace

std::tuple<Tensor, Tensor> sparse_decode(
    const Tensor& q, const Tensor& k_cache, const Tensor& indices, const std::optional<Tensor>& topk_length,
    const std::optional<Tensor>& extra_k_cache, const std::optional<Tensor>& extra_indices,
    const std::optional<Tensor>& extra_topk_length, const std::optional<Tensor>& tile_scheduler_metadata,
    const std::optional<Tensor>& num_splits, const std::optional<Tensor>& attn_sink, const Name& kv_format,
    const std::optional<Name>& extra_kv_format, int64_t head_dim_v, double softmax_scale, bool batch_invariant) {
  return run_into_new(SparseCall(q, k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length,
                                 tile_scheduler_metadata, num_splits, attn_sink, kv_format, extra_kv_format, head_dim_v,
                                 softmax_scale, batch_invariant));
}

void sparse_decode_out(const Tensor& q, const Tensor& k_cache, const Tensor& indices,
                       const std::optional<Tensor>& topk_length, const std::optional<Tensor>& extra_k_cache,
                       const std::optional<Tensor>& extra_indices, const std::optional<Tensor>& extra_topk_length,
                       const std::optional<Tensor>& tile_scheduler_metadata, const std::optional<Tensor>& num_splits,
                       const std::optional<Tensor>& attn_sink, const Name& kv_format,
                       const std::optional<Name>& extra_kv_format, int64_t head_dim_v, double softmax_scale,
                       bool batch_invariant, const Tensor& out, const Tensor& lse) {
  run_into(SparseCall(q, k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length,
                      tile_scheduler_metadata, num_splits, attn_sink, kv_format, extra_kv_format, head_dim_v,
                      softmax_scale, batch_invariant),
           out, lse);
}

std::tuple<Tensor, Tensor> plan_sparse_decode(const Tensor& requests, const std::optional<Tensor>& topk_length,
                                              const std::optional<Tensor>& extra_topk_length, int64_t s_q, int64_t h_q,
                                              int64_t topk, int64_t extra_topk) {
  const View view("requests", requests);
  check(view.device >= 0, ErrorKind::kValue, "requests must be on CUDA");
  check(view.dim > 0 && view.size(0) <= kMostKeys, ErrorKind::kValue,
        "requests must have one row per request and fewer than 2^31, got ", ShapeText{view});
  check(s_q > 0 && h_q > 0 && topk > 0 && extra_topk >= 0 && std::max({s_q, h_q, topk, extra_topk}) <= kMostKeys,
        ErrorKind::kValue, "s_q, h_q and topk must be positive, extra_topk not negative, all less than 2^31, got ", s_q,
        ", ", h_q, ", ", topk, ", ", extra_topk);
  const int64_t b = view.size(0);
  const OnDevice on_device(view.device);
  check_built_for("plan_sparse_decode", view.device);
  PlanParams params{};
  params.lengths[0] = planned("topk_length", topk_length, b, s_q, topk, view.device);
  params.lengths[1] = planned("extra_topk_length", extra_topk_length, b, s_q, extra_topk, view.device);
  params.num_parts = choose_num_parts(s_q * ceil_div<int64_t>(h_q, kRowTile), device_facts(view.device).num_sms);
  Tensor schedule = empty(view.device, ScalarType::Int, {params.num_parts, 8});
  Tensor num_splits = empty(view.device, ScalarType::Int, {b + 1});
  params.schedule = static_cast<ScheduleRow*>(schedule.data_ptr());
  params.num_splits = static_cast<int32_t*>(num_splits.data_ptr());
  params.b = static_cast<int>(b);
  params.min_piece_blocks = 1;
  params.snap_blocks = kSnapBlocks;
  launch_plan(params, current_stream(view.device));
  return {schedule, num_splits};
}

std::string sparse_decode_why_not(int64_t compute_capability, int64_t scalar_type, int64_t kv_format,
                                  int64_t extra_kv_format, bool from_table, int64_t b, int64_t s_q, int64_t h_q,
                                  int64_t h_kv, int64_t d_qk, int64_t d_v, int64_t page_block_size,
                                  int64_t extra_page_block_size, int64_t topk, int64_t extra_topk,
                                  double softmax_scale) {
  constexpr int64_t kNone = static_cast<int64_t>(KVFormat::kNone);
  check(std::min(kv_format, extra_kv_format) >= 0 && std::max(kv_format, extra_kv_format) <= kNone, ErrorKind::kValue,
        "kv_format and extra_kv_format must be in 0 to ", kNone, ", got ", kv_format, " and ", extra_kv_format);
  SparseAttentionProblem problem{};
  problem.compute_capability = static_cast<int>(compute_capability);
  problem.element = scalar_type == 0 ? Element::kBFloat16 : scalar_type == 1 ? Element::kFloat16 : Element::kOther;
  problem.format = static_cast<KVFormat>(kv_format), problem.extra_format = static_cast<KVFormat>(extra_kv_format);
  problem.from_table = from_table;
  problem.b = static_cast<int>(b), problem.s_q = static_cast<int>(s_q), problem.h_q = static_cast<int>(h_q);
  problem.h_kv = static_cast<int>(h_kv), problem.d_qk = static_cast<int>(d_qk), problem.d_v = static_cast<int>(d_v);
  problem.page = static_cast<int>(page_block_size), problem.extra_page = static_cast<int>(extra_page_block_size);
  problem.topk = static_cast<int>(topk), problem.extra_topk = static_cast<int>(extra_topk);
  problem.softmax_scale = static_cast<float>(softmax_scale);
  return explain(sparse_attention_kernels(), problem);
}

}  // namespace flash_mla::api
