// The products: query rows are rows, keys, then columns of the values, are columns.
#pragma once

#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "sm100/product_order.cuh"
#include "sm100/sparse_attention/storage.h"

namespace flash_mla::sm100::sparse_attention {

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
        umma_instruction<typename C::Element>(C::kRows, C::kKeys, Major::kInner, Major::kInner);
    const UmmaDescriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.k[0]), 16);
    const uint32_t scores = tensor_memory_ + C::scores(slot), tile = slot * C::kTileBytes;
    bool accumulate = false;
#pragma unroll
    for (int part = 0; part < kNumParts; ++part) {
      if (C::num_slices(part) == 0) {
        continue;
      }
      mbarrier_wait(shared_address(&storage_.k_full[slot][part]), filled_.parity(slot));
      fence_async_proxy();
      tcgen05_fence_after();
#pragma unroll
      for (int s = C::first_slice(part); s < C::first_slice(part) + C::num_slices(part); ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const uint32_t step = s * C::kSliceBytes + j * 32;
          umma_ss(scores, q.at(step), k.at(tile + step), kInstruction, accumulate);
          accumulate = true;
        }
      }
    }
    umma_commit(shared_address(&storage_.scores_full[slot]));
    filled_.advance(slot);
  }

  __device__ __forceinline__ void issue_values(int slot, bool first) {
    constexpr uint32_t kInstruction =
        umma_instruction<typename C::Element>(C::kRows, C::kProductColumns, Major::kInner, Major::kOuter);
    constexpr int kSlicesOfAProduct = C::kProductColumns / kSliceColumns;
    mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));
    tcgen05_fence_after();
    const UmmaDescriptor p(probabilities_of<C>(storage_, slot), 16),
        values(shared_address(storage_.k[0]), C::kSliceBytes);
    const uint32_t tile = slot * C::kTileBytes;
#pragma unroll
    for (int half = 0; half < kHeadDimV / C::kProductColumns; ++half) {
#pragma unroll
      for (int j = 0; j < C::kKeys / 16; ++j) {
        umma_ss(tensor_memory_ + C::kOutput + half * C::kProductColumns, p.at(j * 32),
                values.at(tile + half * kSlicesOfAProduct * C::kSliceBytes + j * 16 * kSliceRowBytes), kInstruction,
                !first || j > 0);
      }
    }
    umma_commit(shared_address(&storage_.k_empty[slot]));
    scored_.advance(slot);
  }

  Storage<C>& storage_;
  const uint32_t tensor_memory_;
  SlotPhases filled_, scored_;
};

}  // namespace flash_mla::sm100::sparse_attention
