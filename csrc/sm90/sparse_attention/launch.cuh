#pragma once

#include <cuda_runtime.h>

#include <algorithm>

#include "core/error.h"
#include "device/launch.h"
#include "sm90/sparse_attention/kernel.cuh"

namespace flash_mla::sm90::sparse_attention {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim>;
  static_assert(kStorageFits<C>);
  constexpr auto kKernel = sparse_attention_kernel<C>;
  static const cudaError_t attribute_status =
      cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Storage<C>));
  check(attribute_status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(attribute_status));
  const int64_t items = static_cast<int64_t>(params.num_parts) * params.num_units * params.unit_tiles;
  check(items <= INT32_MAX - params.num_sms, ErrorKind::kUnsupported, name, ": ", items, " tiles of work are too many");
  device::launch_dependent(name, kKernel, static_cast<unsigned>(std::min<int64_t>(items, params.num_sms)), C::kThreads,
                           sizeof(Storage<C>), stream, params);
}

}  // namespace flash_mla::sm90::sparse_attention
