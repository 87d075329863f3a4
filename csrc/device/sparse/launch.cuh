// Host side of the sparse attention kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "core/params/sparse_attention.h"
#include "device/launch.h"

namespace flash_mla::inline device {

// A persistent grid over the call's items, each of `kItemTiles` row tiles and computed by as many CTAs, a cluster.
template <auto kKernel, int kThreads, size_t kSharedBytes, int kItemTiles = 1>
void launch_kernel(const char* name, SparseAttentionParams params, void* stream) {
  allow_shared_memory<kKernel, kSharedBytes>(name);
  const int unit_items = ceil_div(params.unit_tiles, kItemTiles);
  const int64_t part_items = static_cast<int64_t>(params.num_units) * unit_items, items = params.num_parts * part_items;
  check(items <= INT32_MAX - params.num_sms, ErrorKind::kUnsupported, name, ": ", items, " tiles of work are too many");
  params.by_tokens_per_batch = make_divisor(params.tokens_per_batch);
  params.by_h_q = make_divisor(params.h_q);
  params.by_unit_items = make_divisor(unit_items);
  params.by_part_items = make_divisor(static_cast<int>(part_items));
  const int64_t at_once = std::min<int64_t>(items, std::max(params.num_sms / kItemTiles, 1));
  launch_dependent_clusters(name, kKernel, kItemTiles, static_cast<unsigned>(at_once * kItemTiles), kThreads,
                            kSharedBytes, stream, params);
}

}  // namespace flash_mla::inline device
