#pragma once

#include "device/sparse/launch.cuh"
#include "sm90/sparse_attention_bf16/kernel.cuh"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <int kHeadDim>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kHeadDim>;
  static_assert(kStorageFits<C>);
  if (params.next_item != nullptr) {
    const cudaError_t status =
        cudaMemsetAsync(params.next_item, 0, sizeof(*params.next_item), static_cast<cudaStream_t>(stream));
    check(status == cudaSuccess, ErrorKind::kCuda, name, ": ", cudaGetErrorString(status));
  }
  launch_kernel<sparse_attention_bf16_kernel<C>, C::kThreads, sizeof(Storage<C>)>(name, params, stream);
}

}  // namespace flash_mla::sm90::sparse_attention_bf16
