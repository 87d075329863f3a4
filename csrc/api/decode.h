// What the decode ops share: checks, memory for partial results, and the launches of a call.
#pragma once

#include <algorithm>
#include <cfloat>
#include <optional>

#include "any/kernels.h"
#include "api/tensor.h"
#include "core/kernel_table.h"
#include "core/params/dense_decode.h"

namespace flash_mla::api {

inline std::optional<View> optional_view(const char* name, const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<View>(View(name, *tensor)) : std::nullopt;
}

void check_schedule(const View& schedule, const View& num_splits, int64_t b, int device);

void check_sink(const View& sink, int64_t h_q, int device);

// Of a decode call for `q` [b, s_q, h_q, d_qk].
void check_outputs(const View& out, const View& lse, const View& q, ScalarType dtype);

// What every decode call needs of these: 512 values of V, a finite scale, sizes that the kernels' integers hold.
void check_options(const View& q, int64_t head_dim_v, double softmax_scale);

// int32 [b, max_blocks] and [b].
void check_paging(const View& table, const View& seqlens, int64_t b, int64_t page, int device);

// Masked scores are -inf, and -inf * 0 is no number: a scale of 0 becomes one that makes no difference.
inline float scale_log2_of(double softmax_scale) {
  return softmax_scale == 0 ? FLT_MIN : static_cast<float>(softmax_scale * 1.4426950408889634);
}

// log2(page), or -1.
int page_shift_of(int64_t page);

// Pieces per request in the batch-invariant mode: what fits into the bound on partial results for a single request. It
// depends on the request's own shape only: where `most_blocks` lowers it, no request is cut otherwise than without.
int choose_max_cuts(int64_t tiles_per_request, int64_t most_blocks, int num_sms);

// Requests of one launch in the batch-invariant mode.
int64_t choose_requests_at_once(int64_t tiles_per_request, int max_cuts, int num_sms);

// Memory for the partial results of `tiles` row tiles: the accumulators, what scales them, and log-sum-exps.
template <class Problem, class Params>
Tensor allocate_partials(const Kernel<Problem, Params>& kernel, int device, int64_t tiles, Params& params) {
  const bool half = kernel.partials == Partials::kHalf;
  const int64_t values = half ? kPartialTile / 2 : kPartialTile, scales = half ? kPartialScales : 0;  // in words
  Tensor memory = empty(device, ScalarType::Float, {tiles * (values + scales + kRowTile)});
  auto* words = static_cast<float*>(memory.data_ptr());
  params.partial_out = words;
  params.partial_scale = half ? words + tiles * values : nullptr;
  params.partial_lse = words + tiles * (values + scales);
  return memory;
}

// The whole call by a schedule. `tiles`: row tiles of a request.
template <class Problem, class Params>
void launch_scheduled(const Kernel<Problem, Params>& kernel, Params& params, const std::optional<View>& schedule,
                      const std::optional<View>& num_splits, int64_t tiles, int device, void* stream) {
  check(schedule && num_splits, ErrorKind::kValue,
        "tile_scheduler_metadata and num_splits must be given, unless enable_batch_invariant is True");
  params.schedule = static_cast<const ScheduleRow*>(schedule->data);
  params.num_splits = static_cast<const int32_t*>(num_splits->data);
  params.num_parts = static_cast<int>(schedule->size(0));
  check(params.num_parts * tiles <= INT32_MAX, ErrorKind::kUnsupported, "tile_scheduler_metadata has too many rows, ",
        params.num_parts, ", for a call with ", tiles, " row tiles per request");
  std::optional<Tensor> partials;
  if (params.num_parts > 1) {
    partials = allocate_partials(kernel, device, kPartialsPerPart * params.num_parts * tiles, params);
  }
  kernel.launch(params, stream);
  if (params.num_parts > 1) {
    launch_combine(params, stream);
  }
}

// The requests [begin, end) with fixed cuts, as many in one launch as there is memory for their partial results.
template <class Problem, class Params>
void launch_fixed_cuts(const Kernel<Problem, Params>& kernel, Params& params, int64_t begin, int64_t end,
                       int64_t at_once, void* stream) {
  for (int64_t first = begin; first < end; first += at_once) {
    params.first_request = static_cast<int>(first);
    params.num_requests = static_cast<int>(std::min(at_once, end - first));
    params.num_parts = params.num_requests * params.max_cuts;
    kernel.launch(params, stream);
    if (params.max_cuts > 1) {
      launch_combine(params, stream);
    }
  }
}

}  // namespace flash_mla::api
