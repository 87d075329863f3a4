// What the kernels that write and read KV caches are given.
#pragma once

#include <cstdint>

#include "core/kv_format.h"

namespace flash_mla {

struct KVCacheParams {
  uint8_t* cache;        // [num_blocks, page, 1, bytes of a token]
  int64_t stride_page;   // bytes
  int64_t stride_token;  // bytes; not read where the format itself lays the rows out
  int64_t page;
  int64_t num_slots;  // num_blocks * page

  uint16_t* rows;      // bfloat16 [num_rows, d_qk]: read by append, written by dequantize (slot by slot)
  int64_t stride_row;  // elements
  int64_t num_rows;
  bool aligned;  // whether rows, and those of a BF16 cache, can be moved 16 bytes at a time

  const void* slots;  // append: [num_rows], int32 or int64
  int64_t stride_slot;
  bool slots_are_int64;
  bool exact_scale;

  KVFormat format;
  int d_qk;
};

}  // namespace flash_mla
