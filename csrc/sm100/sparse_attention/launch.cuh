#pragma once

#include "device/sparse/launch.cuh"
#include "sm100/sparse_attention/kernel.cuh"

namespace flash_mla::sm100::sparse_attention {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim>;
  static_assert(kStorageFits<C>);
  launch_kernel<sparse_attention_kernel<C>, C::kThreads, sizeof(Storage<C>)>(name, params, stream);
}

}  // namespace flash_mla::sm100::sparse_attention
