// The two math warpgroups: the seesaw over the pieces that the producers hand over.
#pragma once

#include "device/sparse/epilogue.cuh"
#include "sm90/grouped_seesaw.cuh"
#include "sm90/sparse_attention_bf16/producer.cuh"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <class C>
class MathWarpgroup : GroupedSeesaw<MathWarpgroup<C>, C, Storage<C>, true> {
  using Base = GroupedSeesaw<MathWarpgroup<C>, C, Storage<C>, true>;
  friend Base;
  using Base::lane_, Base::maximum_, Base::output_, Base::phases_, Base::reference_, Base::row_, Base::side_,
      Base::storage_;

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int side)
      : Base(storage, side, params.scale_log2), params_(params) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const int num_tiles = storage_.pieces[piece].num_tiles;
      if (num_tiles < 0) {
        return;
      }
      this->begin_rows();
      if (num_tiles == 0) {
        this->release_q();
      } else {
        this->run_steps(num_tiles, storage_.pieces[piece]);
      }
      finish_piece(piece);
    }
  }

 private:
  static constexpr bool kCopiedKeys = true;

  // A warpgroup masks the tiles of its own slot.
  __device__ __forceinline__ void mask(float (&scores)[32], const PieceFacts&, int) const {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[side_]);
    if ((valid.x & valid.y) != ~0u) {
      mask_keys(scores, valid.x, valid.y, lane_);
    }
  }

  __device__ __forceinline__ void finish_piece(int piece) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    const PieceFacts& facts = storage_.pieces[piece];
    if (params_.max_logits != nullptr) {
      this->join_maximum();
      if (side_ == 1) {
        write_maximum(params_, facts, row, lane_, maximum_);
      }
    }
    float total[2];
    this->join_sums(piece, total);
    if (facts.partial >= 0) {
      write_partial(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total);
    } else {
      write_final(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total, maximum_);
    }
  }

  const SparseAttentionParams& params_;
};

}  // namespace flash_mla::sm90::sparse_attention_bf16
