// The products of a pair: query rows of both CTAs are rows, keys, then columns of the values, are columns. The CTA of
// rank 0 issues them; the other one tells it what has arrived.
#pragma once

#include "device/cluster.cuh"
#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "sm100/product_order.cuh"
#include "sm100/sparse_attention_paired/storage.h"

namespace flash_mla::sm100::sparse_attention_paired {

template <class C>
class ProductWarp {
 public:
  explicit __device__ __forceinline__ ProductWarp(Storage<C>& storage)
      : storage_(storage), tensor_memory_(storage.tensor_memory) {}

  __device__ __forceinline__ void run() {
    if (cluster_rank() == 0) {
      in_order_of_products(
          storage_, [this](int slot) { issue_scores(slot); },
          [this](int slot, bool first) { issue_values(slot, first); },
          [this](bool any) {
            if (any) {
              umma_commit_pair(shared_address(&storage_.q_empty));
            } else {
              mbarrier_arrive_if(shared_address(&storage_.q_empty), elect_one());
            }
          });
    } else {
      in_order_of_products(
          storage_,
          [this](int slot) {
            pass_on(storage_.keys_full[slot], storage_.peer_keys_full[slot], filled_.parity(slot));
            filled_.advance(slot);
          },
          [this](int slot, bool) {
            pass_on(storage_.values_full[slot], storage_.peer_values_full[slot], scored_.parity(slot));
            scored_.advance(slot);
          },
          [this](bool any) { mbarrier_arrive_if(shared_address(&storage_.q_empty), !any && elect_one()); });
    }
  }

 private:
  // What has been stored in this CTA's shared memory may be read by the other's products. So may Q: it has arrived
  // before a piece's first keys are waited for.
  __device__ __forceinline__ void pass_on(const uint64_t& full, const uint64_t& peer_full, uint32_t parity) const {
    mbarrier_wait(shared_address(&full), parity);
    fence_async_proxy();
    tcgen05_fence_after();
    tcgen05_fence_before();
    if (elect_one()) {
      mbarrier_arrive_peer(address_in_rank(shared_address(&peer_full), 0));
    }
    __syncwarp();
  }

  __device__ __forceinline__ void wait_for_both(const uint64_t& full, const uint64_t& peer_full,
                                                uint32_t parity) const {
    mbarrier_wait(shared_address(&full), parity);
    mbarrier_wait(shared_address(&peer_full), parity);
    fence_async_proxy();
    tcgen05_fence_after();
  }

  __device__ __forceinline__ void issue_scores(int slot) {
    constexpr uint32_t kInstruction =
        umma_instruction<typename C::Element>(C::kRows, C::kKeys, Major::kInner, Major::kInner);
    wait_for_both(storage_.keys_full[slot], storage_.peer_keys_full[slot], filled_.parity(slot));
    const UmmaDescriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.keys[0]), 16);
    const uint32_t scores = tensor_memory_ + C::scores(slot), tile = slot * C::kKeyBytes;
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint64_t keys = k.at(tile + s * C::kKeySliceBytes + j * 32);
        if (s < C::kSharedQSlices) {
          umma_ss<2>(scores, q.at(s * C::kQSliceBytes + j * 32), keys, kInstruction, s + j > 0);
        } else {
          umma_ts<2>(scores, tensor_memory_ + C::tensor_q(s) + j * 8, keys, kInstruction, s + j > 0);
        }
      }
    }
    umma_commit_pair(shared_address(&storage_.scores_full[slot]));
    filled_.advance(slot);
  }

  __device__ __forceinline__ void issue_values(int slot, bool first) {
    constexpr uint32_t kInstruction =
        umma_instruction<typename C::Element>(C::kRows, C::kProductColumns, Major::kInner, Major::kOuter);
    wait_for_both(storage_.values_full[slot], storage_.peer_values_full[slot], scored_.parity(slot));
    mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));
    tcgen05_fence_after();
    const UmmaDescriptor p(shared_address(storage_.probabilities[0]), 16),
        values(shared_address(storage_.values[0]), C::kSliceBytes);
    // Each product has as many of its columns from either CTA.
    constexpr int kSlicesOfAProduct = C::kProductColumns / 2 / kSliceColumns;
#pragma unroll
    for (int part = 0; part < C::kValueSlices / kSlicesOfAProduct; ++part) {
#pragma unroll
      for (int j = 0; j < C::kKeys / 16; ++j) {
        umma_ss<2>(
            tensor_memory_ + C::kOutput + part * C::kProductColumns / 2, p.at(slot * C::kSliceBytes + j * 32),
            values.at(slot * C::kValueBytes + part * kSlicesOfAProduct * C::kSliceBytes + j * 16 * kSliceRowBytes),
            kInstruction, !first || j > 0);
      }
    }
    umma_commit_pair(shared_address(&storage_.values_empty[slot]));
    scored_.advance(slot);
  }

  Storage<C>& storage_;
  const uint32_t tensor_memory_;
  SlotPhases filled_, scored_;
};

}  // namespace flash_mla::sm100::sparse_attention_paired
