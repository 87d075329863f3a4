// Host side of the sparse attention kernels.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "core/params/sparse_attention.h"
#include "device/launch.h"

namespace flash_mla::inline device {

// A persistent grid over the call's items.
template <auto kKernel, int kThreads, size_t kSharedBytes>
void launch_kernel(const char* name, const SparseAttentionParams& params, void* stream) {
  static const cudaError_t attribute_status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes);
  check(attribute_status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(attribute_status));
  const int64_t items = static_cast<int64_t>(params.num_parts) * params.num_units * params.unit_tiles;
  check(items <= INT32_MAX - params.num_sms, ErrorKind::kUnsupported, name, ": ", items, " tiles of work are too many");
  launch_dependent(name, kKernel, static_cast<unsigned>(std::min<int64_t>(items, params.num_sms)), kThreads,
                   kSharedBytes, stream, params);
}

}  // namespace flash_mla::inline device
