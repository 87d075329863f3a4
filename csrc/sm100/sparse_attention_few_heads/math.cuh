// The four math warps: scores from tensor memory, probabilities to shared memory, and at the end of a piece the output
// from tensor memory. A warp has 16 of the 64 keys of a tile, then 16 of each 64 columns of the values, in the fragment
// that accumulators of older tensor cores have.
#pragma once

#include "device/few_rows/softmax.cuh"
#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "sm100/sparse_attention_few_heads/config.h"

namespace flash_mla::sm100::sparse_attention_few_heads {

template <class C>
class MathWarp : FewRowsSoftmax<C, Storage<C>> {
  using Base = FewRowsSoftmax<C, Storage<C>>;
  using Base::kOwnRows, Base::lane_, Base::storage_;

 public:
  __device__ __forceinline__ MathWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : Base(params, storage, warp, lane), tensor_memory_(storage.tensor_memory + tmem_lane(32 * warp)) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      const PieceFacts& facts = storage_.pieces[piece];
      const int num_tiles = facts.num_tiles;
      if (num_tiles < 0) {
        return;
      }
      // The facts of the piece before may go: this warp has written it.
      __syncwarp();
      mbarrier_arrive_if(shared_address(&storage_.q_empty), lane_ == 0);
      this->begin_rows();
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        step(facts, tile);
      }
      finish_piece(facts, num_tiles);
    }
  }

 private:
  __device__ __forceinline__ void step(const PieceFacts& facts, int tile) {
    const int slot = tile & 1;
    mbarrier_wait(shared_address(&storage_.k_full[slot]), phases_.parity(slot));  // for `valid`
    mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));
    tcgen05_fence_after();
    float scores[C::kRows / 2];
    tmem_load_16x256(tensor_memory_ + C::scores(slot), scores);
    tmem_wait_load(scores);
    this->mask(scores, facts, slot, tile);
    this->find_reference(scores, [&](const float (&factor)[kOwnRows]) {
      if (tile > 0) {
        wait_for_values(tile - 1);
        rescale_output(factor);
      }
    });
    this->exponentiate(scores, storage_.probabilities_of(slot));
    tcgen05_fence_before();
    __syncwarp();
    mbarrier_arrive_if(shared_address(&storage_.probabilities_full[slot]), lane_ == 0);
    phases_.advance(slot);
  }

  __device__ __forceinline__ void rescale_output(const float (&factor)[kOwnRows]) const {
#pragma unroll 1
    for (int block = 0; block < C::kBlocks; ++block) {
      const uint32_t address = tensor_memory_ + C::output(block);
      float values[C::kRows / 2];
      tmem_load_16x256(address, values);
      tmem_wait_load(values);
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        values[i] *= factor[i / 4 * 2 + i % 2];
      }
      tmem_store_16x256(address, values);
    }
    tmem_wait_store();
  }

  // The products with the values of a tile, the last that this warp has done its part for, have ended.
  __device__ __forceinline__ void wait_for_values(int tile) const {
    const int slot = tile & 1;
    mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);
    tcgen05_fence_after();
  }

  __device__ __forceinline__ void finish_piece(const PieceFacts& facts, int num_tiles) {
    if (num_tiles > 0) {
      // So all warps have read what they told each other of the last tile, too.
      wait_for_values(num_tiles - 1);
    }
    this->tell_sums();
    constexpr int kBlocksAtOnce = 2;
#pragma unroll 1
    for (int block = 0; block < C::kBlocks; block += kBlocksAtOnce) {
      float output[kBlocksAtOnce][C::kRows / 2] = {};
      if (num_tiles > 0) {
#pragma unroll
        for (int i = 0; i < kBlocksAtOnce; ++i) {
          tmem_load_16x256(tensor_memory_ + C::output(block + i), output[i]);
        }
#pragma unroll
        for (int i = 0; i < kBlocksAtOnce; ++i) {
          tmem_wait_load(output[i]);
        }
      }
      this->write(facts, block, output);
    }
    this->end_writing();
  }

  const uint32_t tensor_memory_;
  SlotPhases phases_;
};

}  // namespace flash_mla::sm100::sparse_attention_few_heads
