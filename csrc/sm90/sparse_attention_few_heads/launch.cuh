#pragma once

#include "device/sparse/launch.cuh"
#include "sm90/sparse_attention_few_heads/kernel.cuh"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows>
void launch_rows(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim, kRows>;
  static_assert(kFewRowsStorageFits<Storage<C>>);
  launch_kernel<sparse_attention_few_heads_kernel<C>, C::kThreads, sizeof(Storage<C>)>(name, params, stream);
}

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  if (params.unit_rows <= 16) {
    launch_rows<kFormat, kExtraFormat, kHeadDim, 16>(name, params, stream);
  } else {
    launch_rows<kFormat, kExtraFormat, kHeadDim, 32>(name, params, stream);
  }
}

}  // namespace flash_mla::sm90::sparse_attention_few_heads
