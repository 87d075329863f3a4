// The two math warpgroups. Warpgroup 0 scores the tile in slot 0 and keeps output columns 0 to 255, warpgroup 1 scores
// slot 1 and keeps columns 256 to 511; each multiplies both tiles' probabilities with its half of the values.
#pragma once

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/producer.cuh"
#include "sm90/seesaw.cuh"

namespace flash_mla::sm90::dense_decode {

template <class C>
class MathWarpgroup : SeesawWarpgroup<typename C::Element, Storage<C>> {
  using T = typename C::Element;
  using Base = SeesawWarpgroup<T, Storage<C>>;
  using Base::lane_, Base::output_, Base::phases_, Base::reference_, Base::row_, Base::side_, Base::storage_,
      Base::sum_;
  using typename Base::Atoms;

 public:
  __device__ __forceinline__ MathWarpgroup(const DenseDecodeParams& params, Storage<C>& storage, const Place& place,
                                           int side)
      : Base(storage, side), params_(params), place_(place) {}

  __device__ __forceinline__ void run() {
    Pieces<false> pieces(params_, place_.part, place_.causal_cut);
    int piece_parity = 0;
    uint32_t q_parity = 0;
    for (Piece piece; pieces.next(piece); piece_parity ^= 1) {
      this->begin_rows();
      unmasked_tiles_ = least_limit(piece) / C::kKeys - piece.begin_tile;
      if (piece.num_tiles > 0) {
        mbarrier_wait(shared_address(&storage_.q_full), q_parity);
        q_parity ^= 1;
        if (side_ == 0) {
          run_left(piece);
        } else {
          run_right(piece);
        }
      }
      finish_piece(piece, piece_parity);
    }
  }

 private:
  // A step takes the tiles in both slots, or, at the end of a piece of odd length, the one in slot 0. No product is in
  // flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises all products then.
  // There is one copy of each step in the code, since small calls spend much of their time fetching instructions.

  // ---- warpgroup 0: scores of slot 0; both products into columns 0 to 255
  __device__ __forceinline__ void run_left(const Piece& piece) {
#pragma unroll 1
    for (int tile = 0; tile < piece.num_tiles; tile += 2) {
      const bool pair = tile + 1 < piece.num_tiles;
      float scores[32];
      issue_scores<0>(scores);
      if (pair) {
        named_barrier_arrive(kScores0Issued, C::kMathThreads);
      }
      wgmma_wait<0>();
      if (tile + 2 >= piece.num_tiles) {
        this->release_q();
      }
      uint32_t probabilities[16];
      softmax(scores, probabilities, piece, tile, [] {});
      this->template store_probabilities<0, 4>(probabilities0(), probabilities);
      fence_async_proxy();
      this->hand_over(storage_.probabilities_full[0]);

      wgmma_fence();
      multiply_registers<0>(0, probabilities);
      wgmma_wait<1>();
      release(0, kCols0);
      wgmma_wait<0>();
      release(0, kCols128);
      phases_.advance(0);

      if (pair) {
        mbarrier_wait(shared_address(&storage_.probabilities_full[1]), phases_.parity(1));
        this->adopt_reference();
        wait_for_values(1, kCols0);
        wgmma_fence();
        this->template multiply_shared<0>(1, shared_address(storage_.probabilities[0]));
        wgmma_wait<1>();
        release(1, kCols0);
        wgmma_wait<0>();
        release(1, kCols128);
        phases_.advance(1);
      }
    }
  }

  // ---- warpgroup 1: scores of slot 1; both products into columns 256 to 511
  __device__ __forceinline__ void run_right(const Piece& piece) {
#pragma unroll 1
    for (int tile = 0; tile < piece.num_tiles; tile += 2) {
      const bool pair = tile + 1 < piece.num_tiles;
      float scores[32];
      if (pair) {
        named_barrier_sync(kScores0Issued, C::kMathThreads);
        issue_scores<1>(scores);
        wgmma_wait<0>();
        release(1, kRope);
      }
      if (tile + 2 >= piece.num_tiles) {
        this->release_q();
      }
      mbarrier_wait(shared_address(&storage_.probabilities_full[0]), phases_.parity(0));
      this->adopt_reference();
      wait_for_values(0, kCols256);
      wgmma_fence();
      this->template multiply_shared<1>(0, probabilities0());
      auto finish_slot0 = [this] {
        wgmma_wait<0>();
        release(0, kCols256);
        release(0, kCols384);
        release(0, kRope);
      };
      if (pair) {
        uint32_t probabilities[16];
        softmax(scores, probabilities, piece, tile + 1, finish_slot0);
        this->template store_probabilities<0, 4>(shared_address(storage_.probabilities[0]), probabilities);
        fence_async_proxy();
        this->hand_over(storage_.probabilities_full[1]);
        wgmma_fence();
        multiply_registers<1>(1, probabilities);
        wgmma_wait<1>();
        release(1, kCols256);
        wgmma_wait<0>();
        release(1, kCols384);
        phases_.advance(1);
      } else {
        finish_slot0();
      }
      phases_.advance(0);
    }
  }

  // ---- the parts of a step
  // Scores of a slot, groups of slices in the order in which they arrive.
  template <int kSlot>
  __device__ __forceinline__ void issue_scores(float (&scores)[32]) {
    const Descriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.k[kSlot]), 16);
    bool accumulate = false;
#pragma unroll
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(kSlot, order);
      if (C::num_slices(group) == 0) {
        continue;
      }
      mbarrier_wait(shared_address(&storage_.k_full[kSlot][group]), phases_.parity(kSlot));
      wgmma_fence();
#pragma unroll
      for (int s = C::first_slice(group); s < C::first_slice(group) + C::num_slices(group); ++s) {
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

  // Scores -> probabilities of one tile. `before_exponentials` ends the products that still write the output; about
  // then they are done anyway.
  template <class BeforeExponentials>
  __device__ __forceinline__ void softmax(float (&scores)[32], uint32_t (&probabilities)[16], const Piece& piece,
                                          int tile, BeforeExponentials&& before_exponentials) {
    if (tile >= unmasked_tiles_) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = row_limit(piece, row_ + 8 * r) - (piece.begin_tile + tile) * C::kKeys;
      }
      mask_scores(scores, limit, lane_);
    }
    this->move_reference(scores, params_.scale_log2, before_exponentials);
    exponentiate<T, 0, 4>(scores, params_.scale_log2, reference_, sum_, probabilities);
  }

  // How many keys a row of the tile sees.
  __device__ __forceinline__ int row_limit(const Piece& piece, int row) const {
    const int token = (place_.row_tile * C::kRows + row) / params_.group;
    return params_.causal ? piece.seqlen - (params_.s_q - 1 - token) : piece.seqlen;
  }

  // What every row of the tile sees: only the last tiles of a request need a mask.
  __device__ __forceinline__ int least_limit(const Piece& piece) const { return max(row_limit(piece, 0), 0); }

  // d_qk 576: the probabilities of slot 0 lie in its RoPE slice, which is dead once it is scored. Else in two tiles by
  // turns, since the other warpgroup may still read those of the step before.
  __device__ __forceinline__ uint32_t probabilities0() const {
    if constexpr (C::kHasRope) {
      return shared_address(storage_.k[0]) + 8 * C::kSliceBytes;
    } else {
      return shared_address(storage_.probabilities[1 + phases_.parity(0)]);
    }
  }

  // output += probabilities (registers) x one side's value columns of a slot; one commit for each half of the columns.
  template <int kSide>
  __device__ __forceinline__ void multiply_registers(int slot, const uint32_t (&probabilities)[16]) {
    const Descriptor values(shared_address(storage_.k[slot]), C::kSliceBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_rs<typename Atoms::OutputRS>(output_[half], &probabilities[4 * j],
                                           values.at(Base::values_offset(kSide, half, j)), true);
      }
      wgmma_commit();
    }
  }

  // The other warpgroup has seen these tiles arrive; the async proxy wants every reader to.
  __device__ __forceinline__ void wait_for_values(int slot, int first_group) {
    mbarrier_wait(shared_address(&storage_.k_full[slot][first_group]), phases_.parity(slot));
    mbarrier_wait(shared_address(&storage_.k_full[slot][first_group + 1]), phases_.parity(slot));
  }

  __device__ __forceinline__ void release(int slot, int group) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[slot][group]));
    }
  }

  __device__ __forceinline__ void finish_piece(const Piece& piece, int piece_parity) {
    float total[2];
    this->join_sums(piece_parity, total);
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    if (piece.partial >= 0) {
      write_partial(params_, place_, piece, side_, row, lane_, output_, reference_, total);
    } else {
      write_final<T>(params_, place_, piece, side_, row, lane_, output_, reference_, total);
    }
  }

  const DenseDecodeParams& params_;
  const Place place_;
  int unmasked_tiles_ = 0;  // of the piece
};

}  // namespace flash_mla::sm90::dense_decode
