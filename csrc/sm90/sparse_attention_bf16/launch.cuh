#pragma once

#include "device/sparse/launch.cuh"
#include "sm90/sparse_attention_bf16/kernel.cuh"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kHeadDim>;
  static_assert(kStorageFits<C>);
  launch_kernel<sparse_attention_bf16_kernel<C>, C::kThreads, sizeof(Storage<C>)>(name, params, stream);
}

}  // namespace flash_mla::sm90::sparse_attention_bf16
