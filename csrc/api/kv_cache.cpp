#include "api/kv_cache.h"

#include "any/kernels.h"
#include "api/device.h"
#include "api/kv_format.h"

namespace flash_mla::api {
namespace {

constexpr int kAlignment = 16;

bool is_aligned(const View& view) { return reinterpret_cast<uintptr_t>(view.data) % kAlignment == 0; }

// Whether all rows of bfloat16 can be moved 16 bytes at a time.
bool has_aligned_rows(const View& view) {
  bool aligned = is_aligned(view) && view.size(view.dim - 1) * 2 % kAlignment == 0;
  for (int d = 0; d + 1 < view.dim; ++d) {
    aligned &= view.size(d) <= 1 || view.stride(d) * 2 % kAlignment == 0;
  }
  return aligned;
}

bool is_byte_type(ScalarType dtype) {
  return dtype == ScalarType::Byte || dtype == ScalarType::Char || dtype == ScalarType::Float8_e4m3fn;
}

void check_byte_cache(const View& cache, const KVLayout& layout) {
  check(is_byte_type(cache.dtype), ErrorKind::kType, "cache must have dtype Float8_e4m3fn, Char or Byte, got ",
        dtype_text(cache.dtype));
  check_size(cache, 3, layout.row_bytes, "[num_blocks, page_block_size, 1, bytes per token]");
  if (layout.scales_behind_page) {
    check(cache.size(1) == 1 || cache.stride(1) == layout.row_bytes, ErrorKind::kValue,
          "cache must have stride(1) = ", layout.row_bytes, ", got ", cache.stride(1));
  } else {
    check(cache.size(1) == 1 || cache.stride(1) % kAlignment == 0, ErrorKind::kValue,
          "cache must have a stride(1) that is a multiple of 16 bytes, got ", cache.stride(1));
  }
  check(cache.size(0) == 1 || cache.stride(0) % kAlignment == 0, ErrorKind::kValue,
        "cache must have a stride(0) that is a multiple of 16 bytes, got ", cache.stride(0));
  check(is_aligned(cache), ErrorKind::kUnsupported, "cache must have an address that is a multiple of 16 bytes");
}

// What both ops tell their kernel of a cache, checked.
KVCacheParams params_of(const View& cache, KVFormat format) {
  check(cache.device >= 0, ErrorKind::kValue, "cache must be on CUDA");
  check_dim(cache, 4, "[num_blocks, page_block_size, 1, d_qk or bytes per token]");
  check(cache.size(0) >= 1 && cache.size(1) >= 1, ErrorKind::kValue,
        "cache must have num_blocks and page_block_size of at least 1, got ", ShapeText{cache});
  check_size(cache, 2, 1, "[num_blocks, page_block_size, 1, d_qk or bytes per token]");
  check_contiguous_last(cache);
  KVCacheParams params{};
  params.format = format;
  params.cache = static_cast<uint8_t*>(cache.data);
  params.page = cache.size(1);
  params.num_slots = cache.size(0) * cache.size(1);
  const int64_t element_bytes = format == KVFormat::kBf16 ? 2 : 1;
  params.stride_page = cache.stride(0) * element_bytes;
  params.stride_token = cache.stride(1) * element_bytes;
  if (format == KVFormat::kBf16) {
    check_dtype(cache, ScalarType::BFloat16);
    params.d_qk = static_cast<int>(cache.size(3));
    params.aligned = has_aligned_rows(cache);
  } else {
    const KVLayout layout = layout_of(format);
    check_byte_cache(cache, layout);
    params.d_qk = layout.d_qk;
    params.aligned = true;
  }
  return params;
}

void check_beside_kv(const View& view, const View& kv) {
  check(view.device == kv.device, ErrorKind::kValue, view.name, " must be on the device of kv (", DeviceText{kv.device},
        "), got ", DeviceText{view.device});
}

}  // namespace

void append_kv_cache(const Tensor& kv, const Tensor& cache, const Tensor& slot_mapping, const Name& kv_format,
                     bool exact_scale) {
  const View rows("kv", kv), cache_view("cache", cache), slots("slot_mapping", slot_mapping);
  KVCacheParams params = params_of(cache_view, format_of("kv_format", kv_format));
  check_dim(rows, 2, "[tokens, d_qk]");
  check_size(rows, 1, params.d_qk, "[tokens, d_qk]");
  check_dtype(rows, ScalarType::BFloat16);
  check_contiguous_last(rows);
  check_beside_kv(cache_view, rows);
  check_dim(slots, 1, "[tokens]");
  check_size(slots, 0, rows.size(0), "[tokens]");
  check(slots.dtype == ScalarType::Int || slots.dtype == ScalarType::Long, ErrorKind::kType,
        "slot_mapping must have dtype Int or Long, got ", dtype_text(slots.dtype));
  check_beside_kv(slots, rows);
  check(!exact_scale || (params.format == KVFormat::kV32 || params.format == KVFormat::kV32NoRope), ErrorKind::kValue,
        "exact_scale must be False for ", kv_format.view(), ", which has no float32 scales");
  check_built_for("append_kv_cache", rows.device);
  params.rows = static_cast<uint16_t*>(rows.data);
  params.num_rows = rows.size(0);
  params.stride_row = rows.stride(0);
  params.aligned &= has_aligned_rows(rows);
  params.slots = slots.data;
  params.stride_slot = slots.stride(0);
  params.slots_are_int64 = slots.dtype == ScalarType::Long;
  params.exact_scale = exact_scale;
  const OnDevice on_device(rows.device);
  launch_append_kv_cache(params, current_stream(rows.device));
}

Tensor dequantize_kv_cache(const Tensor& cache, const Name& kv_format) {
  return dequantized(View("cache", cache), format_of("kv_format", kv_format));
}

Tensor dequantized(const View& view, KVFormat format) {
  KVCacheParams params = params_of(view, format);
  check_built_for("dequantize_kv_cache", view.device);
  const OnDevice on_device(view.device);
  Tensor values = empty(view.device, ScalarType::BFloat16, {view.size(0), params.page, 1, params.d_qk});
  params.rows = static_cast<uint16_t*>(values.data_ptr());
  params.num_rows = params.num_slots;
  params.stride_row = params.d_qk;
  launch_dequantize_kv_cache(params, current_stream(view.device));
  return values;
}

std::string kv_cache_why_not(int64_t compute_capability) {
  return why_not_built_for(static_cast<int>(compute_capability));
}

}  // namespace flash_mla::api
