// The products of the kernels for few heads: keys, then columns of the values, are rows, query rows are columns.
#pragma once

#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "sm100/product_order.cuh"
#include "sm100/sparse_attention_few_heads/config.h"

namespace flash_mla::sm100::sparse_attention_few_heads {

template <class C>
class ProductWarp {
 public:
  explicit __device__ __forceinline__ ProductWarp(Storage<C>& storage)
      : storage_(storage), tensor_memory_(storage.tensor_memory) {}

  __device__ __forceinline__ void run() {
    issue_products(
        storage_, [this](int slot) { issue_scores(slot); },
        [this](int slot, bool first) { issue_values(slot, first); });
  }

 private:
  __device__ __forceinline__ void issue_scores(int slot) {
    constexpr uint32_t kInstruction =
        umma_instruction<typename C::Element>(C::kProductRows, C::kRows, Major::kInner, Major::kInner);
    static_assert(C::kProductRows == C::kKeys);
    mbarrier_wait(shared_address(&storage_.k_full[slot]), filled_.parity(slot));
    fence_async_proxy();
    tcgen05_fence_after();
    const UmmaDescriptor k(storage_.tile_of(slot), 16), q(shared_address(storage_.q), 16);
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        umma_ss(tensor_memory_ + C::scores(slot), k.at(s * C::kSliceBytes + j * 32), q.at(s * C::kQSliceBytes + j * 32),
                kInstruction, s + j > 0);
      }
    }
    umma_commit(shared_address(&storage_.scores_full[slot]));
    filled_.advance(slot);
  }

  __device__ __forceinline__ void issue_values(int slot, bool first) {
    constexpr uint32_t kInstruction =
        umma_instruction<typename C::Element>(C::kProductRows, C::kRows, Major::kOuter, Major::kInner);
    static_assert(C::kProductRows == kSliceColumns);  // so nothing lies behind a slice
    mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));
    tcgen05_fence_after();
    const UmmaDescriptor values(storage_.tile_of(slot), 0), p(storage_.probabilities_of(slot), 16);
#pragma unroll
    for (int block = 0; block < C::kBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < C::kKeys / 16; ++j) {
        umma_ss(tensor_memory_ + C::output(block), values.at(block * C::kSliceBytes + j * 16 * kSliceRowBytes),
                p.at(j * 32), kInstruction, !first || j > 0);
      }
    }
    umma_commit(shared_address(&storage_.k_empty[slot]));
    scored_.advance(slot);
  }

  Storage<C>& storage_;
  const uint32_t tensor_memory_;
  SlotPhases filled_, scored_;
};

}  // namespace flash_mla::sm100::sparse_attention_few_heads
