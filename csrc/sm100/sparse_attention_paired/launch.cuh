#pragma once

#include "device/sparse/launch.cuh"
#include "sm100/sparse_attention_paired/kernel.cuh"

namespace flash_mla::sm100::sparse_attention_paired {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim>;
  static_assert(kStorageFits<C>);
  launch_kernel<sparse_attention_paired_kernel<C>, C::kThreads, sizeof(Storage<C>), C::kRows / kRowTile>(name, params,
                                                                                                         stream);
}

}  // namespace flash_mla::sm100::sparse_attention_paired
