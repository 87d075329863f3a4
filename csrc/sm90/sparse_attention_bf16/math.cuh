// The two math warpgroups: the seesaw over the pieces that the producers hand over.
#pragma once

#include "device/sparse/epilogue.cuh"
#include "device/sparse/row_writer.cuh"
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
    this->begin_rows();
    if (side_ == 0) {
      float scores[32];
      bool scored = false;  // those of the piece's first tile have been made beside the results of the piece before
      for (int num_tiles; (num_tiles = next_piece()) >= 0; piece_ ^= 1) {
        if (num_tiles > 0) {
          this->template run_left<true>(num_tiles, piece(), scores, scored);
        }
        scored = finish_left(scores);
        this->begin_rows();
        wgmma_wait<0>();
      }
    } else {
      for (int num_tiles; (num_tiles = next_piece()) >= 0; piece_ ^= 1) {
        if (num_tiles > 0) {
          this->run_right(num_tiles, piece());
        }
        finish_right();
        this->begin_rows();
      }
    }
  }

 private:
  static constexpr bool kCopiedKeys = true;
  static constexpr int kNextIsThere = 2;  // a named barrier

  __device__ __forceinline__ const PieceFacts& piece() const { return storage_.pieces[piece_]; }

  // Tiles of the next piece, whose Q is there then. Negative behind the last.
  __device__ __forceinline__ int next_piece() {
    mbarrier_wait(shared_address(&storage_.q_full), piece_);
    const int num_tiles = piece().num_tiles;
    if (num_tiles == 0) {
      this->release_q();
      sums_are_final();
    }
    return num_tiles;
  }

  // A warpgroup masks the tiles of its own slot.
  __device__ __forceinline__ uint2 load_mask() const { return *reinterpret_cast<const uint2*>(storage_.valid[side_]); }

  __device__ __forceinline__ void mask(float (&scores)[32], const PieceFacts&, int, const uint2& valid) const {
    if ((valid.x & valid.y) != ~0u) {
      mask_keys(scores, valid.x, valid.y, lane_);
    }
  }

  __device__ __forceinline__ void sums_are_final() {
    this->join_maximum();
    if (side_ == 1 && lane_ % 4 == 0) {
      storage_.row_maximum[piece_][row_] = maximum_[0];
      storage_.row_maximum[piece_][row_ + 8] = maximum_[1];
    }
    this->publish_sums(piece_);
  }

  // Writes the piece. Where the next one's first tile is there halfway, its scores are made meanwhile: then true.
  __device__ __forceinline__ bool finish_left(float (&scores)[32]) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    float total[2];
    this->gather_sums(piece_, total);
    if (piece().partial >= 0) {
      write_partial(params_, piece(), 0, true, row, lane_, output_, reference_, total);
      return false;
    }
    maximum_[0] = fmaxf(maximum_[0], storage_.row_maximum[piece_][row]);
    maximum_[1] = fmaxf(maximum_[1], storage_.row_maximum[piece_][row + 8]);
    const RowWriter writer(params_, piece(), 0, row, lane_, reference_, total, maximum_);
    writer.template write<0>(output_[0]);
    const bool missing = !mbarrier_test(shared_address(&storage_.q_full), piece_ ^ 1) ||
                         !mbarrier_test(shared_address(&storage_.k_full[0]), phases_.parity(0));
    if (!named_barrier_any(kNextIsThere, C::kMathThreads / 2, missing)) {
      const int num_tiles = storage_.pieces[piece_ ^ 1].num_tiles;
      if (num_tiles > 0) {
        this->begin_scores(scores, num_tiles > 1);
        writer.template write<1>(output_[1]);
        return true;
      }
    }
    writer.template write<1>(output_[1]);
    return false;
  }

  __device__ __forceinline__ void finish_right() {
    int row = row_;
    asm volatile("" : "+r"(row));
    float total[2];
    this->gather_sums(piece_, total);
    if (piece().partial >= 0) {
      write_partial(params_, piece(), 1, false, row, lane_, output_, reference_, total);
    } else {
      const RowWriter writer(params_, piece(), 1, row, lane_, reference_, total, maximum_);
      writer.template write<0>(output_[0]);
      writer.template write<1>(output_[1]);
    }
  }

  const SparseAttentionParams& params_;
  uint32_t piece_ = 0;  // parity of its number
};

}  // namespace flash_mla::sm90::sparse_attention_bf16
