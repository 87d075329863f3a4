#include "api/sparse_keys.h"

#include <algorithm>

#include "api/decode.h"

namespace flash_mla::api {

void check_rows(const View& cache, KVFormat format, const View& q) {
  const int64_t d_qk = q.size(q.dim - 1);
  check_dim(cache, 4, "[num_blocks, page, 1, d_qk or bytes per token]");
  check(cache.size(0) > 0 && cache.size(1) > 0 && cache.size(1) <= kMostKeys, ErrorKind::kValue, cache.name,
        " must have pages of at least one row and fewer than 2^31, got ", ShapeText{cache});
  check_size(cache, 2, 1, "[num_blocks, page, 1, d_qk or bytes per token]");
  check_device(cache, q.device);
  check_contiguous_last(cache);
  if (format == KVFormat::kBf16) {
    check_dtype(cache, ScalarType::BFloat16);
    check_size(cache, 3, d_qk, "[num_blocks, page, 1, d_qk]");
    check_aligned(cache, 2);
    return;
  }
  const KVLayout layout = layout_of(format);
  check(cache.dtype == ScalarType::Float8_e4m3fn || cache.dtype == ScalarType::Char || cache.dtype == ScalarType::Byte,
        ErrorKind::kType, cache.name, " must have dtype Float8_e4m3fn, Char or Byte, got ", dtype_text(cache.dtype));
  check(layout.d_qk == d_qk, ErrorKind::kValue, "q must have d_qk ", layout.d_qk, ", like the format of ", cache.name,
        ", got ", ShapeText{q});
  check_size(cache, 3, layout.row_bytes, "[num_blocks, page, 1, bytes per token]");
  if (layout.scales_behind_page) {
    check(cache.size(1) == 1 || cache.stride(1) == layout.row_bytes, ErrorKind::kValue, cache.name,
          " must have stride(1) ", layout.row_bytes, ", got ", cache.stride(1));
    check(reinterpret_cast<uintptr_t>(cache.data) % 16 == 0 && (cache.size(0) == 1 || cache.stride(0) % 16 == 0),
          ErrorKind::kUnsupported, cache.name, " must have an address and a stride(0) that are multiples of 16 bytes");
  } else {
    check_aligned(cache, 1);
  }
}

KeySource source_of_cache(const View& cache) {
  constexpr int64_t kMostSlots = int64_t{1} << 31;
  KeySource source{};
  const int64_t element_bytes = cache.dtype == ScalarType::BFloat16 ? 2 : 1, pages = cache.size(0),
                page = cache.size(1);
  source.cache = cache.data;
  source.stride_page = cache.stride(0) * element_bytes, source.stride_row = cache.stride(1) * element_bytes;
  source.page = static_cast<int>(page);
  source.page_shift = page_shift_of(page);
  source.num_slots = static_cast<uint32_t>(std::min(std::min(pages, kMostSlots) * page, kMostSlots));
  return source;
}

}  // namespace flash_mla::api
