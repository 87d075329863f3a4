#pragma once

#include "sm90/sparse_attention/launch_kernel.cuh"
#include "sm90/sparse_attention_bf16_few_heads/kernel.cuh"

namespace flash_mla::sm90::sparse_attention_bf16_few_heads {

template <int kHeadDim, int kRows>
void launch_rows(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kHeadDim, kRows>;
  static_assert(kStorageFits<C>);
  sparse_attention::launch_kernel<sparse_attention_bf16_few_heads_kernel<C>, C::kThreads, sizeof(Storage<C>)>(
      name, params, stream);
}

template <int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  if (params.unit_rows <= 16) {
    launch_rows<kHeadDim, 16>(name, params, stream);
  } else {
    launch_rows<kHeadDim, 32>(name, params, stream);
  }
}

}  // namespace flash_mla::sm90::sparse_attention_bf16_few_heads
