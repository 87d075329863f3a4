// The four math warps: scores from tensor memory, probabilities to shared memory, and at the end of a piece the output
// from tensor memory. A warp has 16 of the 64 rows, in the fragment that accumulators of older tensor cores have.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "device/softmax.cuh"
#include "device/sparse/epilogue.cuh"
#include "sm100/sparse_attention/storage.h"

namespace flash_mla::sm100::sparse_attention {

template <class C>
class MathWarp {
 public:
  __device__ __forceinline__ MathWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : params_(params),
        storage_(storage),
        tensor_memory_(storage.tensor_memory + tmem_lane(32 * warp)),
        warp_(warp),
        lane_(lane),
        row_(warp * 16 + lane / 4),
        scale_log2_(scale_of_scores<C::kFormat>(params)) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      const int num_tiles = storage_.pieces[piece].num_tiles;
      if (num_tiles < 0) {
        return;
      }
      // The facts of the piece before may go: this warp has written it.
      __syncwarp();
      mbarrier_arrive_if(shared_address(&storage_.q_empty), lane_ == 0);
      begin_rows();
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        step(piece, tile);
      }
      finish_piece(piece, num_tiles);
    }
  }

 private:
  __device__ __forceinline__ void begin_rows() {
    reference_[0] = reference_[1] = kNoMax;
    sum_[0] = sum_[1] = 0;
    maximum_[0] = maximum_[1] = -INFINITY;
  }

  __device__ __forceinline__ void step(int piece, int tile) {
    const int slot = tile & 1;
    mbarrier_wait(shared_address(&storage_.k_full[slot][kValues]), phases_.parity(slot));  // for `valid`
    mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));
    tcgen05_fence_after();
    float scores[32];
    tmem_load_16x256(tensor_memory_ + C::scores(slot), scores);
    tmem_wait_load(scores);
    mask(scores, piece, tile);
    move_reference(scores, tile);
    uint32_t probabilities[16];
    exponentiate<typename C::Element, 0, 4>(scores, scale_log2(), reference_, sum_, probabilities);
    store_probabilities(probabilities_of<C>(storage_, slot), probabilities);
    fence_async_proxy();
    tcgen05_fence_before();
    __syncwarp();
    mbarrier_arrive_if(shared_address(&storage_.probabilities_full[slot]), lane_ == 0);
    phases_.advance(slot);
  }

  __device__ __forceinline__ void mask(float (&scores)[32], int piece, int tile) const {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[tile & 1]);
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
  }

  // Moves the reference maximum where a score of the tile outgrows it, and with it the output, once the values of the
  // tile before have been added.
  __device__ __forceinline__ void move_reference(const float (&scores)[32], int tile) {
    float largest[2], factor[2];
    row_maximum(scores, largest);
    bool outgrown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * scale_log2();
      maximum_[r] = fmaxf(maximum_[r], scaled);
      const bool grows = scaled > reference_[r] + kSlack;
      factor[r] = grows ? exp2_approx(reference_[r] - scaled) : 1.0f;
      reference_[r] = grows ? scaled : reference_[r];
      sum_[r] *= factor[r];
      outgrown |= grows;
    }
    if (__any_sync(~0u, outgrown) && tile > 0) {
      wait_for_values(tile - 1);
      rescale_output(factor);
    }
  }

  __device__ __forceinline__ void rescale_output(const float (&factor)[2]) const {
#pragma unroll 1
    for (int column = 0; column < kHeadDimV; column += 64) {
      const uint32_t address = tensor_memory_ + C::kOutput + column;
      float values[32];
      tmem_load_16x256(address, values);
      tmem_wait_load(values);
#pragma unroll
      for (int i = 0; i < 32; ++i) {
        values[i] *= factor[i / 2 % 2];
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

  __device__ __forceinline__ void store_probabilities(uint32_t tile, const uint32_t (&probabilities)[16]) const {
    const int row = warp_ * 16 + lane_ % 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int unit = 2 * j + lane_ / 16;
      store_matrix_x4(tile + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16), &probabilities[4 * j]);
    }
  }

  __device__ __forceinline__ void finish_piece(int piece, int num_tiles) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    const PieceFacts& facts = storage_.pieces[piece];
    const float total[2] = {quad_sum(sum_[0]), quad_sum(sum_[1])};
    if (params_.max_logits != nullptr) {
      write_maximum(params_, facts, row, lane_, maximum_);
    }
    if (num_tiles > 0) {
      wait_for_values(num_tiles - 1);
    }
#pragma unroll 1
    for (int side = 0; side < 2; ++side) {
      float output[2][64];
      if (num_tiles > 0) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          tmem_load_16x256(tensor_memory_ + C::kOutput + side * 256 + half * 128, output[half]);
        }
        tmem_wait_load(output[0]);
        tmem_wait_load(output[1]);
      } else {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          output[0][i] = output[1][i] = 0;
        }
      }
      if constexpr (has_one_scale(C::kFormat)) {
        const float descale = descale_of_output<C::kFormat>(params_);
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          output[0][i] *= descale;
          output[1][i] *= descale;
        }
      }
      if (facts.partial >= 0) {
        write_partial(params_, facts, side, side == 0, row, lane_, output, reference_, total);
      } else {
        write_final<typename C::Element>(params_, facts, side, side == 0, row, lane_, output, reference_, total,
                                         maximum_);
      }
    }
  }

  // Where it is the call's it is no register.
  __device__ __forceinline__ float scale_log2() const {
    return has_one_scale(C::kFormat) ? scale_log2_ : params_.scale_log2;
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  const uint32_t tensor_memory_;
  const int warp_, lane_, row_;  // row_: the first of the thread's two rows, the other is 8 further
  const float scale_log2_;
  SlotPhases phases_;
  float reference_[2], sum_[2], maximum_[2];
};

}  // namespace flash_mla::sm100::sparse_attention
