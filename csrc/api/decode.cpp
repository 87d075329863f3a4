#include "api/decode.h"

#include <bit>
#include <cmath>

namespace flash_mla::api {

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

void check_sink(const View& sink, int64_t h_q, int device) {
  check_dim(sink, 1, "[h_q]");
  check_size(sink, 0, h_q, "[h_q]");
  check_dtype(sink, ScalarType::Float);
  check_device(sink, device);
  check_contiguous_last(sink);
}

void check_outputs(const View& out, const View& lse, const View& q, ScalarType dtype) {
  check_dim(out, 4, "[b, s_q, h_q, 512]");
  check_size(out, 0, q.size(0), "[b, s_q, h_q, 512]");
  check_size(out, 1, q.size(1), "[b, s_q, h_q, 512]");
  check_size(out, 2, q.size(2), "[b, s_q, h_q, 512]");
  check_size(out, 3, kHeadDimV, "[b, s_q, h_q, 512]");
  check_dtype(out, dtype);
  check_device(out, q.device);
  check_contiguous_last(out);
  check_aligned(out, 2);
  check_dim(lse, 3, "[b, h_q, s_q]");
  check_size(lse, 0, q.size(0), "[b, h_q, s_q]");
  check_size(lse, 1, q.size(2), "[b, h_q, s_q]");
  check_size(lse, 2, q.size(1), "[b, h_q, s_q]");
  check_dtype(lse, ScalarType::Float);
  check_device(lse, q.device);
}

void check_options(const View& q, int64_t head_dim_v, double softmax_scale) {
  check(head_dim_v == kHeadDimV, ErrorKind::kValue, "head_dim_v must be 512, got ", head_dim_v);
  check(std::isfinite(softmax_scale), ErrorKind::kValue, "softmax_scale must be finite, got ", softmax_scale);
  constexpr int64_t kMaxRows = int64_t{1} << 30;
  check(q.size(0) < kMaxRows && q.size(1) * q.size(2) < kMaxRows, ErrorKind::kValue,
        "q must have fewer than 2^30 requests and rows per request, got ", ShapeText{q});
}

void check_paging(const View& table, const View& seqlens, int64_t b, int64_t page, int device) {
  check_dim(table, 2, "[b, max_blocks]");
  check_size(table, 0, b, "[b, max_blocks]");
  check_dtype(table, ScalarType::Int);
  check_device(table, device);
  check_contiguous_last(table);
  check_dim(seqlens, 1, "[b]");
  check_size(seqlens, 0, b, "[b]");
  check_dtype(seqlens, ScalarType::Int);
  check_device(seqlens, device);
  check(seqlens.stride(0) == 1 || b <= 1, ErrorKind::kValue, "cache_seqlens must be contiguous");
  check(table.size(1) * page <= INT32_MAX - kScheduleBlock, ErrorKind::kValue,
        "block_table must cover fewer than 2^31 keys per request, got ", ShapeText{table}, " pages of ", page);
}

int page_shift_of(int64_t page) {
  return std::has_single_bit(static_cast<uint64_t>(page)) ? std::countr_zero(static_cast<uint64_t>(page)) : -1;
}

int choose_max_cuts(int64_t tiles_per_request, int64_t most_blocks, int num_sms) {
  const int64_t fits = kPartialsPerPart * num_sms / tiles_per_request,
                useful = ceil_div<int64_t>(most_blocks, kMinCutBlocks);
  return static_cast<int>(std::clamp<int64_t>(std::min(fits, useful), 1, kMaxCuts));
}

int64_t choose_requests_at_once(int64_t tiles_per_request, int max_cuts, int num_sms) {
  return std::max<int64_t>(
      max_cuts == 1 ? INT32_MAX / tiles_per_request : kPartialsPerPart * num_sms / (tiles_per_request * max_cuts), 1);
}

}  // namespace flash_mla::api
