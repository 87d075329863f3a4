// The two math warpgroups. Warpgroup 0 scores a tile, finds its probabilities and keeps output columns 0 to 255;
// warpgroup 1 keeps columns 256 to 511. Each multiplies the probabilities, from registers, with its half of the values.
#pragma once

#include "device/sparse/epilogue.cuh"
#include "device/sparse/row_writer.cuh"
#include "device/sparse/walk.h"
#include "sm90/seesaw.cuh"
#include "sm90/sparse_attention/storage.h"

namespace flash_mla::sm90::sparse_attention {

template <class C>
class MathWarpgroup : SeesawWarpgroup<__nv_bfloat16, Storage<C>, true> {
  using T = __nv_bfloat16;
  using Base = SeesawWarpgroup<T, Storage<C>, true>;
  using Base::lane_, Base::maximum_, Base::output_, Base::reference_, Base::row_, Base::side_, Base::storage_,
      Base::sum_, Base::thread_;
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
        run_right(num_tiles);
      }
      finish_piece(piece);
    }
  }

 private:
  // No product is in flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises
  // all products then.

  // ---- warpgroup 0: scores, probabilities; products into columns 0 to 255
  __device__ __forceinline__ void run_left(int num_tiles, int piece) {
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      float scores[32];
      issue_scores(scores);
      wgmma_wait<0>();
      if (tile + 1 == num_tiles) {
        this->release_q();
      }
      find_reference(scores, piece, tile);
      uint32_t probabilities[16];
      find_probabilities(scores, probabilities);
      multiply<0>(probabilities);
    }
  }

  // ---- warpgroup 1: products into columns 256 to 511
  __device__ __forceinline__ void run_right(int num_tiles) {
    this->release_q();
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      // The other warpgroup has seen the tile arrive; the async proxy wants every reader to.
      wait_for_quarter(2);
      wait_for_quarter(3);
      fence_async_proxy();
      mbarrier_wait(shared_address(&storage_.probabilities_full), tiles_ & 1);
      uint32_t probabilities[16];
      load_probabilities(probabilities);
      this->adopt_reference();
      multiply<1>(probabilities);
    }
  }

  // ---- the parts of a step
  // Where a quarter of the present tile lies.
  struct Place {
    int index;
    uint32_t parity;
  };
  __device__ __forceinline__ Place place_of(int quarter) const {
    const int index = first_place_ + quarter;
    return index < C::kPlaces ? Place{index, parity_} : Place{index - C::kPlaces, parity_ ^ 1};
  }
  __device__ __forceinline__ uint32_t address_of(int quarter) const {
    return shared_address(storage_.k) + place_of(quarter).index * C::kQuarterBytes;
  }

  __device__ __forceinline__ void next_tile() {
    const Place next = place_of(C::kQuarters);
    first_place_ = next.index;
    parity_ = next.parity;
    ++tiles_;
  }

  __device__ __forceinline__ void wait_for_quarter(int quarter) {
    const Place place = place_of(quarter);
    mbarrier_wait(shared_address(&storage_.k_full[place.index]), place.parity);
  }

  // Scores, the quarters of the tile in the order in which they arrive.
  __device__ __forceinline__ void issue_scores(float (&scores)[32]) {
    const Descriptor q(shared_address(storage_.q), 16);
#pragma unroll
    for (int quarter = 0; quarter < C::kQuarters; ++quarter) {
      const Descriptor k(address_of(quarter), 16);
      wait_for_quarter(quarter);
      fence_async_proxy();
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < 2; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma_ss<typename Atoms::Scores>(scores, q.at((2 * quarter + i) * C::kSliceBytes + j * 32),
                                           k.at(i * C::kSliceBytes + j * 32), quarter + i + j > 0);
        }
      }
      if (C::kRopeBehindValues && quarter + 1 == C::kQuarters) {
        const Descriptor rope(shared_address(storage_.tail), 16);
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma_ss<typename Atoms::Scores>(scores, q.at(C::kRopeSlice * C::kSliceBytes + j * 32), rope.at(j * 32),
                                           true);
        }
      }
      wgmma_commit();
    }
  }

  // Masks the scores and moves the reference maximum where one outgrows it.
  __device__ __forceinline__ void find_reference(float (&scores)[32], int piece, int tile) {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[tiles_ % kValidTurns]);
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
    this->move_reference(scores, scale_log2());
    if constexpr (!C::kRopeBehindValues) {
      // Else the producers have waited for it.
      mbarrier_wait(shared_address(&storage_.tail_empty), tiles_ & 1 ^ 1);
    }
    this->publish_reference();
  }

  // Scores -> probabilities, as operands of this warpgroup's products and in shared memory for the other one.
  __device__ __forceinline__ void find_probabilities(const float (&scores)[32], uint32_t (&probabilities)[16]) {
    exponentiate<T, 0, 4>(scores, scale_log2(), reference_, sum_, probabilities);
    this->template store_probabilities<0, 4>(shared_address(storage_.tail), probabilities);
    this->hand_over(storage_.probabilities_full);
  }

  __device__ __forceinline__ void load_probabilities(uint32_t (&probabilities)[16]) const {
    const int row = thread_ / 32 * 16 + lane_ % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int unit = 2 * j + lane_ / 16;
      uint32_t fragment[4];
      load_matrix_x4(shared_address(storage_.tail) + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16), fragment);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        probabilities[4 * j + i] = fragment[i];
      }
    }
  }

  // Into this warpgroup's columns, from two quarters, which are handed back when their products have ended.
  template <int kSide>
  __device__ __forceinline__ void multiply(const uint32_t (&probabilities)[16]) {
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Descriptor values(address_of(2 * kSide + half), C::kSliceBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_rs<typename Atoms::OutputRS>(output_[half], &probabilities[4 * j], values.at(j * 16 * kSliceRowBytes),
                                           true);
      }
      wgmma_commit();
    }
    wgmma_wait<1>();
    release(storage_.k_empty[place_of(2 * kSide).index]);
    wgmma_wait<0>();
    release(storage_.k_empty[place_of(2 * kSide + 1).index]);
    if (kSide == 1) {
      release(storage_.tail_empty);
    }
    next_tile();
  }

  __device__ __forceinline__ void release(uint64_t& barrier) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&barrier));
    }
  }

  __device__ __forceinline__ void finish_piece(int piece) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    const PieceFacts& facts = storage_.pieces[piece];
    if (params_.max_logits != nullptr) {
      this->join_maximum();
    }
    // Warpgroup 0 alone has sums, and need not wait.
    this->publish_sums(piece);
    float total[2] = {sum_[0], sum_[1]};
    if (side_ == 1) {
      this->gather_sums(piece, total);
    }
    if constexpr (has_one_scale(C::kFormat)) {
      this->scale_output(descale_of_output<C::kFormat>(params_));
    }
    if (facts.partial >= 0) {
      write_partial<true>(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total);
    } else {
      const RowWriter writer(params_, facts, side_, row, lane_, reference_, total, maximum_);
      writer.write<0>(output_[0]);
      writer.write<1>(output_[1]);
    }
  }

  // Where it is the call's it is no register.
  __device__ __forceinline__ float scale_log2() const {
    return has_one_scale(C::kFormat) ? scale_log2_ : params_.scale_log2;
  }

  const SparseAttentionParams& params_;
  const float scale_log2_;
  int first_place_ = 0;  // of the tile
  uint32_t parity_ = 0;  // of that place
  uint32_t tiles_ = 0;
};

}  // namespace flash_mla::sm90::sparse_attention
