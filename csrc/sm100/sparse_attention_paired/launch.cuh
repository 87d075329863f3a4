#pragma once

#include "device/sparse/launch.cuh"
#include "sm100/dense_as_sparse.h"
#include "sm100/sparse_attention_paired/kernel.cuh"

namespace flash_mla::sm100::sparse_attention_paired {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, class Element = __nv_bfloat16>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim, Element>;
  static_assert(kStorageFits<C>);
  launch_kernel<sparse_attention_paired_kernel<C>, C::kThreads, sizeof(Storage<C>), C::kRows / kRowTile>(name, params,
                                                                                                         stream);
}

template <class Element, int kHeadDim>
void launch_dense(const char* name, const DenseDecodeParams& params, void* stream) {
  for_each_key_head(params, [&](const SparseAttentionParams& keys) {
    launch<KVFormat::kBf16, KVFormat::kNone, kHeadDim, Element>(name, keys, stream);
  });
}

}  // namespace flash_mla::sm100::sparse_attention_paired
