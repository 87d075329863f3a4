// The ops that write and read KV caches; their schemas are in library.cpp.
#pragma once

#include <string>

#include "api/tensor.h"
#include "api/text.h"
#include "core/kv_format.h"

namespace flash_mla::api {

void append_kv_cache(const Tensor& kv, const Tensor& cache, const Tensor& slot_mapping, const Name& kv_format,
                     bool exact_scale);

Tensor dequantize_kv_cache(const Tensor& cache, const Name& kv_format);

// The same for other ops: a cache as bfloat16 [num_blocks, page, 1, d_qk].
Tensor dequantized(const View& cache, KVFormat format);

// "", or why this build does not serve the ops on GPUs of a compute capability (90 for 9.0).
std::string kv_cache_why_not(int64_t compute_capability);

}  // namespace flash_mla::api
