// The math warpgroup. Keys, then columns of the values, are the rows of its products, and query rows their columns: 16
// or 32 of them cost a quarter or half of what 64 would.
#pragma once

#include "device/few_rows/softmax.cuh"
#include "device/slots.cuh"
#include "device/sm90/wgmma.cuh"
#include "sm90/sparse_attention_few_heads/config.h"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <class C>
class MathWarpgroup : FewRowsSoftmax<C, Storage<C>> {
  using Base = FewRowsSoftmax<C, Storage<C>>;
  using Base::kOwnRows, Base::lane_, Base::storage_;
  using Atoms = WgmmaSwappedAtoms<C::kRows>;
  static constexpr int kBlocks = kHeadDimV / 64;  // of output columns

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage)
      : Base(params, storage, threadIdx.x / 32 % 4, threadIdx.x % 32) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const PieceFacts& facts = storage_.pieces[piece];
      const int num_tiles = facts.num_tiles;
      if (num_tiles < 0) {
        return;
      }
      begin_output();
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int slot = tile & 1;
        float scores[C::kRows / 2];
        score(slot, scores);
        this->mask(scores, facts, slot, tile);
        this->find_reference(scores, [this](const float (&factor)[kOwnRows]) { rescale_output(factor); });
        this->exponentiate(scores, storage_.probabilities_of(slot));
        named_barrier_sync(kWarpsHaveTold, C::kMathThreads);
        multiply(slot);
        release(slot);
      }
      finish_piece(facts);
    }
  }

 private:
  __device__ __forceinline__ void begin_output() {
    this->begin_rows();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        output_[block][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void score(int slot, float (&scores)[C::kRows / 2]) {
    mbarrier_wait(shared_address(&storage_.k_full[slot]), phases_.parity(slot));
    fence_async_proxy();
    const Descriptor q(shared_address(storage_.q), 16), k(storage_.tile_of(slot), 16);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::Scores>(scores, k.at(s * C::kSliceBytes + j * 32), q.at(s * C::kQSliceBytes + j * 32),
                                         s + j > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void rescale_output(const float (&factor)[kOwnRows]) {
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        output_[block][i] *= factor[i / 4 * 2 + i % 2];
      }
    }
  }

  __device__ __forceinline__ void multiply(int slot) {
    const Descriptor values(storage_.tile_of(slot), C::kSliceBytes), p(storage_.probabilities_of(slot), 16);
    wgmma_fence();
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::Output>(output_[block], values.at(block * C::kSliceBytes + j * 16 * kSliceRowBytes),
                                         p.at(j * 32), true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[slot]));
    }
    phases_.advance(slot);
  }

  __device__ __forceinline__ void finish_piece(const PieceFacts& facts) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
    this->tell_sums();
    this->write(facts, 0, output_);
    this->end_writing();
  }

  SlotPhases phases_;
  float output_[kBlocks][C::kRows / 2];
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
