// The two math warpgroups, as in dense decode. Warpgroup 0 scores the tile in slot 0 and keeps output columns 0 to 255,
// warpgroup 1 scores slot 1 and keeps columns 256 to 511; each multiplies both tiles' probabilities with its half of
// the values.
#pragma once

#include "device/sm90/wgmma.cuh"
#include "device/softmax.cuh"
#include "sm90/sparse_attention/epilogue.cuh"
#include "sm90/sparse_attention/producer.cuh"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class MathWarpgroup {
  using T = __nv_bfloat16;
  using Atoms = WgmmaAtoms<T>;

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int side)
      : params_(params),
        storage_(storage),
        side_(side),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % 32),
        row_(thread_ / 32 * 16 + lane_ / 4) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const int num_tiles = storage_.pieces[piece].num_tiles;
      if (num_tiles < 0) {
        return;
      }
      reference_[0] = reference_[1] = kNoMax;
      sum_[0] = sum_[1] = 0;
      clear_output();
      if (num_tiles == 0) {
        release_q();
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
        release_q();
      }
      find_reference<0>(scores, piece, tile, [] {});
      multiply_own<0>(scores, probabilities0());
      wgmma_wait<0>();
      release(0);
      phases_.advance(0);

      if (pair) {
        mbarrier_wait(shared_address(&storage_.probabilities_full[1]), phases_.parity(1));
        adopt_reference();
        wait_for_values(1);
        wgmma_fence();
        multiply_shared<0>(1, shared_address(storage_.probabilities[0]));
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
        release_q();
      }
      mbarrier_wait(shared_address(&storage_.probabilities_full[0]), phases_.parity(0));
      adopt_reference();
      wait_for_values(0);
      wgmma_fence();
      multiply_shared<1>(0, probabilities0());
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
  // Scores of a slot, groups of slices in the order in which they arrive.
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
    float largest[2];
    row_maximum(scores, largest);
    bool outgrown = false;
    float next[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * params_.scale_log2;
      const bool grows = scaled > reference_[r] + kSlack;
      next[r] = grows ? scaled : reference_[r];
      outgrown |= grows;
    }
    before_rescaling();
    if (__any_sync(~0u, outgrown)) {
      rescale(next);
    }
    if (lane_ % 4 == 0) {
      storage_.row_max[row_] = reference_[0];
      storage_.row_max[row_ + 8] = reference_[1];
    }
  }

  // Scores -> probabilities in shared memory, from where both warpgroups multiply them: as operands in registers they
  // would cost 16 registers, which the producers need.
  template <int kSide>
  __device__ __forceinline__ void multiply_own(const float (&scores)[32], uint32_t tile) {
    uint32_t half[8];
    exponentiate<T, 0, 2>(scores, params_.scale_log2, reference_, sum_, half);
    store_probabilities<0>(tile, half);
    exponentiate<T, 2, 2>(scores, params_.scale_log2, reference_, sum_, half);
    store_probabilities<1>(tile, half);
    fence_async_proxy();
    hand_over(storage_.probabilities_full[kSide]);
    wgmma_fence();
    multiply_shared<kSide>(kSide, tile);
  }

  __device__ __forceinline__ void rescale(const float (&next)[2]) {
    const float factor[2] = {exp2_approx(reference_[0] - next[0]), exp2_approx(reference_[1] - next[1])};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] *= factor[r];
      reference_[r] = next[r];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        output_[half][i] *= factor[(i / 2) % 2];
      }
    }
  }

  // The other warpgroup may have moved the reference; the products into this one's output have ended.
  __device__ __forceinline__ void adopt_reference() {
    const float next[2] = {storage_.row_max[row_], storage_.row_max[row_ + 8]};
    if (__any_sync(~0u, next[0] != reference_[0] || next[1] != reference_[1])) {
      rescale(next);
    }
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

  // Half of the columns of a tile of probabilities.
  template <int kHalf>
  __device__ __forceinline__ void store_probabilities(uint32_t tile, const uint32_t (&probabilities)[8]) {
    const int row = thread_ / 32 * 16 + lane_ % 16;
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int unit = 4 * kHalf + 2 * j + lane_ / 16;
      store_matrix_x4(tile + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16), &probabilities[4 * j]);
    }
  }

  template <int kSide>
  __device__ __forceinline__ void multiply_shared(int slot, uint32_t probabilities) {
    const Descriptor values(shared_address(storage_.k[slot]), C::kSliceBytes), p(probabilities, 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::OutputSS>(output_[half], p.at(j * 32), values.at(values_offset(kSide, half, j)), true);
      }
      wgmma_commit();
    }
  }

  // Where in a slot 16 keys x 128 columns of the values lie, which are the first 512 columns of the keys.
  static constexpr uint32_t values_offset(int side, int half, int j) {
    return (side * 4 + half * 2) * C::kSliceBytes + j * 16 * kSliceRowBytes;
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

  // What the warp has stored is there for the threads that wait.
  __device__ __forceinline__ void hand_over(uint64_t& barrier) {
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&barrier));
    }
  }

  __device__ __forceinline__ void release(int slot) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[slot]));
    }
  }

  __device__ __forceinline__ void release_q() {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
  }

  __device__ __forceinline__ void clear_output() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        output_[half][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void finish_piece(int piece) {
    float* sums = storage_.row_sum[piece][side_];
    const float own[2] = {quad_sum(sum_[0]), quad_sum(sum_[1])};
    if (lane_ % 4 == 0) {
      sums[row_] = own[0];
      sums[row_ + 8] = own[1];
    }
    hand_over(storage_.row_sums_full);
    mbarrier_wait(shared_address(&storage_.row_sums_full), piece);
    const float* others = storage_.row_sum[piece][1 - side_];
    const float total[2] = {own[0] + others[row_], own[1] + others[row_ + 8]};
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    const PieceFacts& facts = storage_.pieces[piece];
    if (facts.partial >= 0) {
      write_partial(params_, facts, side_, row, lane_, output_, reference_, total);
    } else {
      write_final(params_, facts, side_, row, lane_, output_, reference_, total);
    }
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  const int side_;
  const int thread_, lane_, row_;  // row_: the first of the thread's two rows, the other is 8 further
  SlotPhases phases_;
  float output_[2][64];
  float reference_[2], sum_[2];
};

}  // namespace flash_mla::sm90::sparse_attention
