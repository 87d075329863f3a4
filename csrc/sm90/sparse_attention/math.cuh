// The two math warpgroups, as in dense decode. Warpgroup 0 scores the tile in slot 0 and keeps output columns 0 to 255,
// warpgroup 1 scores slot 1 and keeps columns 256 to 511; each multiplies both tiles' probabilities with its half of
// the values.
#pragma once

#include "device/sparse/epilogue.cuh"
#include "device/sparse/producer.cuh"
#include "sm90/seesaw.cuh"
#include "sm90/sparse_attention/storage.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class MathWarpgroup : SeesawWarpgroup<__nv_bfloat16, Storage<C>, true> {
  using T = __nv_bfloat16;
  using Base = SeesawWarpgroup<T, Storage<C>, true>;
  using Base::lane_, Base::maximum_, Base::output_, Base::phases_, Base::reference_, Base::row_, Base::side_,
      Base::storage_, Base::sum_;
  using typename Base::Atoms;

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int side)
      : Base(storage, side), params_(params), scale_log2_(scale_of_scores<C::kFormat>(params)) {}

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
      } else if (side_ == 0) {
        run_left(num_tiles, piece);
      } else {
        run_right(num_tiles, piece);
      }
      finish_piece(piece);
    }
  }

 private:
  // A step takes the tiles in both slots, or, at the end of a piece of odd length, the one in slot 0. No product is in
  // flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises all products then.
  // There is one copy of each step in the code, since small calls spend much of their time fetching instructions.

  // ---- warpgroup 0: scores of slot 0; both products into columns 0 to 255
  __device__ __forceinline__ void run_left(int num_tiles, int piece) {
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += 2) {
      const bool pair = tile + 1 < num_tiles;
      float scores[32];
      issue_scores<0>(scores);
      if (pair) {
        named_barrier_arrive(kScores0Issued, C::kMathThreads);
      }
      wgmma_wait<0>();
      if (tile + 2 >= num_tiles) {
        this->release_q();
      }
      find_reference<0>(scores, piece, tile, [] {});
      multiply_own<0>(scores, probabilities0());
      wgmma_wait<0>();
      release(0);
      phases_.advance(0);

      if (pair) {
        mbarrier_wait(shared_address(&storage_.probabilities_full[1]), phases_.parity(1));
        this->adopt_reference();
        wait_for_values(1);
        wgmma_fence();
        this->template multiply_shared<0>(1, shared_address(storage_.probabilities[0]));
        wgmma_wait<0>();
        release(1);
        phases_.advance(1);
      }
    }
  }

  // ---- warpgroup 1: scores of slot 1; both products into columns 256 to 511
  __device__ __forceinline__ void run_right(int num_tiles, int piece) {
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += 2) {
      const bool pair = tile + 1 < num_tiles;
      float scores[32];
      if (pair) {
        named_barrier_sync(kScores0Issued, C::kMathThreads);
        issue_scores<1>(scores);
        wgmma_wait<0>();
      }
      if (tile + 2 >= num_tiles) {
        this->release_q();
      }
      mbarrier_wait(shared_address(&storage_.probabilities_full[0]), phases_.parity(0));
      this->adopt_reference();
      wait_for_values(0);
      wgmma_fence();
      this->template multiply_shared<1>(0, probabilities0());
      auto finish_slot0 = [this] {
        wgmma_wait<0>();
        release(0);
      };
      if (pair) {
        find_reference<1>(scores, piece, tile + 1, finish_slot0);
        multiply_own<1>(scores, shared_address(storage_.probabilities[0]));
        wgmma_wait<0>();
        release(1);
        phases_.advance(1);
      } else {
        finish_slot0();
      }
      phases_.advance(0);
    }
  }

  // ---- the parts of a step
  // Scores of a slot, its parts in the order in which they arrive.
  template <int kSlot>
  __device__ __forceinline__ void issue_scores(float (&scores)[32]) {
    const Descriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.k[kSlot]), 16);
    bool accumulate = false;
#pragma unroll
    for (int part = 0; part < kNumParts; ++part) {
      if (C::num_slices(part) == 0) {
        continue;
      }
      wait_for_keys(kSlot, part);
      wgmma_fence();
#pragma unroll
      for (int s = C::first_slice(part); s < C::first_slice(part) + C::num_slices(part); ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma_ss<typename Atoms::Scores>(scores, q.at(s * C::kSliceBytes + j * 32), k.at(s * C::kSliceBytes + j * 32),
                                           accumulate);
          accumulate = true;
        }
      }
    }
    wgmma_commit();
  }

  // Masks the scores and moves the reference maximum where one outgrows it. `before_rescaling` ends the products that
  // still write the output; about then they are done anyway.
  template <int kSlot, class BeforeRescaling>
  __device__ __forceinline__ void find_reference(float (&scores)[32], int piece, int tile,
                                                 BeforeRescaling&& before_rescaling) {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[kSlot]);
    if ((valid.x & valid.y) != ~0u) {
      mask_keys(scores, valid.x, valid.y, lane_);
    }
    if (params_.causal) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = storage_.pieces[piece].limit - tile * C::kKeys +
                   (storage_.pieces[piece].row_tile * C::kRows + row_ + 8 * r) / params_.h_q;
      }
      if (limit[0] < C::kKeys || limit[1] < C::kKeys) {
        mask_scores(scores, limit, lane_);
      }
    }
    this->move_reference(scores, scale_log2(), before_rescaling);
    this->publish_reference();
  }

  // Scores -> probabilities in shared memory, from where both warpgroups multiply them: as operands in registers they
  // would cost 16 registers, which the producers need.
  template <int kSide>
  __device__ __forceinline__ void multiply_own(const float (&scores)[32], uint32_t tile) {
    uint32_t half[8];
    exponentiate<T, 0, 2>(scores, scale_log2(), reference_, sum_, half);
    this->template store_probabilities<0, 2>(tile, half);
    exponentiate<T, 2, 2>(scores, scale_log2(), reference_, sum_, half);
    this->template store_probabilities<2, 2>(tile, half);
    fence_async_proxy();
    this->hand_over(storage_.probabilities_full[kSide]);
    wgmma_fence();
    this->template multiply_shared<kSide>(kSide, tile);
  }

  // d_qk 576: the probabilities of slot 0 lie in its RoPE slice, which is dead once it is scored. Else in two tiles by
  // turns, since the other warpgroup may still read those of the step before.
  __device__ __forceinline__ uint32_t probabilities0() const {
    if constexpr (C::kRopeBehindValues) {
      return shared_address(storage_.k[0]) + 8 * C::kSliceBytes;
    } else {
      return shared_address(storage_.probabilities[1 + phases_.parity(0)]);
    }
  }

  __device__ __forceinline__ void wait_for_keys(int slot, int part) {
    mbarrier_wait(shared_address(&storage_.k_full[slot][part]), phases_.parity(slot));
    fence_async_proxy();
  }

  // The other warpgroup has seen the tile arrive; the async proxy wants every reader to.
  __device__ __forceinline__ void wait_for_values(int slot) {
    wait_for_keys(slot, kValues);
    if constexpr (C::kRopeInValues) {
      wait_for_keys(slot, kRope);
    }
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[slot]));
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
    if constexpr (has_one_scale(C::kFormat)) {
      this->scale_output(descale_of_output<C::kFormat>(params_));
    }
    if (facts.partial >= 0) {
      write_partial(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total);
    } else {
      write_final(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total, maximum_);
    }
  }

  // Where it is the call's it is no register.
  __device__ __forceinline__ float scale_log2() const {
    return has_one_scale(C::kFormat) ? scale_log2_ : params_.scale_log2;
  }

  const SparseAttentionParams& params_;
  const float scale_log2_;
};

}  // namespace flash_mla::sm90::sparse_attention
