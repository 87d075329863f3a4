#pragma once

#include "device/sparse/launch.cuh"
#include "sm100/dense_as_sparse.h"
#include "sm100/sparse_attention_few_heads/kernel.cuh"

namespace flash_mla::sm100::sparse_attention_few_heads {

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, int kRows, class Element>
void launch_rows(const char* name, const SparseAttentionParams& params, void* stream) {
  using C = Config<kFormat, kExtraFormat, kHeadDim, kRows, Element>;
  static_assert(kFewRowsStorageFits<Storage<C>>);
  launch_kernel<sparse_attention_few_heads_kernel<C>, C::kThreads, sizeof(Storage<C>)>(name, params, stream);
}

template <KVFormat kFormat, KVFormat kExtraFormat, int kHeadDim, class Element = __nv_bfloat16>
void launch(const char* name, const SparseAttentionParams& params, void* stream) {
  if (params.unit_rows <= 16) {
    launch_rows<kFormat, kExtraFormat, kHeadDim, 16, Element>(name, params, stream);
  } else {
    launch_rows<kFormat, kExtraFormat, kHeadDim, 32, Element>(name, params, stream);
  }
}

template <class Element, int kHeadDim>
void launch_dense(const char* name, const DenseDecodeParams& params, void* stream) {
  for_each_key_head(params, [&](const SparseAttentionParams& keys) {
    launch<KVFormat::kBf16, KVFormat::kNone, kHeadDim, Element>(name, keys, stream);
  });
}

}  // namespace flash_mla::sm100::sparse_attention_few_heads
