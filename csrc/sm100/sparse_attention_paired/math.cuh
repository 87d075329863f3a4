// The four math warps of a CTA: scores from tensor memory, probabilities to shared memory, and at the end of a piece
// the output from tensor memory. A thread has a row, and with it half of a tile's keys; the other half, and the other
// half of the output's columns, belong to the same thread of the warp after next.
#pragma once

#include "device/barrier.cuh"
#include "device/cluster.cuh"
#include "device/copy.cuh"
#include "device/slots.cuh"
#include "device/sm100/tcgen05.cuh"
#include "device/softmax.cuh"
#include "device/sparse/epilogue.cuh"
#include "sm100/sparse_attention_paired/storage.h"

namespace flash_mla::sm100::sparse_attention_paired {

template <class C>
class MathWarp {
  static constexpr int kScores = C::kKeys / 2;  // of a thread
  static_assert(kScores == 32);

 public:
  __device__ __forceinline__ MathWarp(const SparseAttentionParams& params, Storage<C>& storage, int warp, int lane)
      : params_(params),
        storage_(storage),
        tensor_memory_(storage.tensor_memory + tmem_lane(32 * warp)),
        half_(warp / 2),
        row_group_(warp % 2),
        lane_(lane) {}

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
      reference_ = kNoMax;
      sum_ = 0;
      maximum_ = -INFINITY;
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        step(piece, tile);
      }
      finish_piece(piece, num_tiles);
    }
  }

 private:
  __device__ __forceinline__ int row() const { return row_group_ * 32 + lane_; }

  __device__ __forceinline__ void step(int piece, int tile) {
    const int slot = tile & 1;
    mbarrier_wait(shared_address(&storage_.valid_full[turn_]), turn_parity_);
    mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));
    tcgen05_fence_after();
    float scores[kScores];
    tmem_load_32x32(tensor_memory_ + C::scores(slot), scores);
    tmem_wait_load(scores);
    mask(scores, piece, tile);
    move_reference(scores, tile);
    uint32_t probabilities[kScores / 2];
    exponentiate(scores, probabilities);
    const uint32_t place = shared_address(storage_.probabilities[0]) + slot * C::kSliceBytes + row() * kSliceRowBytes;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_words(place + (((half_ * 4 + i) ^ row() % 8) * 16),
                  make_uint4(probabilities[4 * i], probabilities[4 * i + 1], probabilities[4 * i + 2],
                             probabilities[4 * i + 3]));
    }
    fence_async_proxy();
    tcgen05_fence_before();
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive_peer(address_in_rank(shared_address(&storage_.probabilities_full[slot]), 0));
    }
    phases_.advance(slot);
    turn_ = (turn_ + 1) % kValidTurns;
    turn_parity_ ^= turn_ == 0;
  }

  // The keys of a half are four of each producer warp.
  __device__ __forceinline__ void mask(float (&scores)[kScores], int piece, int tile) const {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[turn_]);
    if ((valid.x & valid.y) != ~0u) {
      const uint32_t words[2] = {valid.x >> 4 * half_, valid.y >> 4 * half_};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        scores[i] = words[i / 16] >> (i / 4 % 4 * 8 + i % 4) & 1 ? scores[i] : -INFINITY;
      }
    }
    if (params_.causal) {
      const PieceFacts& facts = storage_.pieces[piece];
      const int tile_row = facts.row_tile * C::kRows + cluster_rank() * kRowTile + row(),
                limit = facts.limit - tile * C::kKeys + tile_row / params_.h_q - 4 * half_;
      if (limit < C::kKeys) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
          scores[i] = i / 4 * 8 + i % 4 < limit ? scores[i] : -INFINITY;
        }
      }
    }
  }

  // Moves the row's reference maximum where a score of the tile outgrows it, and with it the output, once the values of
  // the tile before have been added.
  __device__ __forceinline__ void move_reference(const float (&scores)[kScores], int tile) {
    float largest[4] = {scores[0], scores[1], scores[2], scores[3]};
#pragma unroll
    for (int i = 4; i < kScores; ++i) {
      largest[i % 4] = fmaxf(largest[i % 4], scores[i]);
    }
    float scaled = fmaxf(fmaxf(largest[0], largest[1]), fmaxf(largest[2], largest[3])) * params_.scale_log2;
    maximum_ = fmaxf(maximum_, scaled);
    if (!named_barrier_any(barrier_of_rows(), 64, scaled > reference_ + kSlack)) {
      return;
    }
    scaled = fmaxf(scaled, other_half(0, scaled));
    const bool grows = scaled > reference_ + kSlack;
    const float factor = grows ? exp2_approx(reference_ - scaled) : 1.0f;
    reference_ = grows ? scaled : reference_;
    sum_ *= factor;
    if (tile > 0) {
      wait_for_values(tile - 1);
      rescale_output(factor);
    }
  }

  __device__ __forceinline__ int barrier_of_rows() const { return 1 + row_group_; }

  // What the thread with the other half of the row's keys has. Between two calls with the same `which` stands another
  // barrier of these warps.
  __device__ __forceinline__ float other_half(int which, float value) const {
    storage_.row_values[which][half_][row()] = value;
    named_barrier_sync(barrier_of_rows(), 64);
    return storage_.row_values[which][half_ ^ 1][row()];
  }

  __device__ __forceinline__ void rescale_output(float factor) const {
#pragma unroll 1
    for (int column = 0; column < kHeadDimV / 2; column += 32) {
      const uint32_t address = tensor_memory_ + C::kOutput + column;
      float values[32];
      tmem_load_32x32(address, values);
      tmem_wait_load(values);
#pragma unroll
      for (float& value : values) {
        value *= factor;
      }
      tmem_store_32x32(address, values);
    }
    tmem_wait_store();
  }

  // The products with the values of a tile, the last that this warp has done its part for, have ended.
  __device__ __forceinline__ void wait_for_values(int tile) const {
    const int slot = tile & 1;
    mbarrier_wait(shared_address(&storage_.values_empty[slot]), phases_.parity(slot) ^ 1);
    tcgen05_fence_after();
  }

  __device__ __forceinline__ void exponentiate(const float (&scores)[kScores], uint32_t (&packed)[kScores / 2]) {
    float partial[4] = {};
#pragma unroll
    for (int i = 0; i < kScores; i += 2) {
      const float x = exp2_approx(fmaf(scores[i], params_.scale_log2, -reference_)),
                  y = exp2_approx(fmaf(scores[i + 1], params_.scale_log2, -reference_));
      partial[i % 4] += x;
      partial[i % 4 + 1] += y;
      packed[i / 2] = pack2<typename C::Element>(x, y);
    }
    sum_ += (partial[0] + partial[1]) + (partial[2] + partial[3]);
  }

  __device__ __forceinline__ void finish_piece(int piece, int num_tiles) {
    PieceFacts facts = storage_.pieces[piece];
    facts.row_tile = facts.row_tile * 2 + cluster_rank();
    const float row_maximum = fmaxf(maximum_, other_half(1, maximum_)), row_sum = sum_ + other_half(0, sum_);
    if (num_tiles > 0) {
      wait_for_values(num_tiles - 1);
    }
    // Sixteen rows at a time, in the fragment that accumulators of older tensor cores have.
#pragma unroll 1
    for (int group = 0; group < 2; ++group) {
      const int row = row_group_ * 32 + group * 16 + lane_ / 4;
      float reference[2], sum[2], maximum[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int from = group * 16 + lane_ / 4 + 8 * r;
        reference[r] = __shfl_sync(~0u, reference_, from);
        sum[r] = __shfl_sync(~0u, row_sum, from);
        maximum[r] = __shfl_sync(~0u, row_maximum, from);
      }
      if (params_.max_logits != nullptr && half_ == 0) {
        write_maximum(params_, facts, row, lane_, maximum);
      }
      float output[2][64];
      if (num_tiles > 0) {
#pragma unroll
        for (int part = 0; part < 2; ++part) {
          tmem_load_16x256(tensor_memory_ + tmem_lane(16 * group) + C::kOutput + part * 128, output[part]);
        }
        tmem_wait_load(output[0]);
        tmem_wait_load(output[1]);
      } else {
#pragma unroll
        for (int i = 0; i < 64; ++i) {
          output[0][i] = output[1][i] = 0;
        }
      }
      if (facts.partial >= 0) {
        write_partial(params_, facts, half_, half_ == 0, row, lane_, output, reference, sum);
      } else {
        write_final<typename C::Element>(params_, facts, half_, half_ == 0, row, lane_, output, reference, sum,
                                         maximum);
      }
    }
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  const uint32_t tensor_memory_;
  const int half_, row_group_, lane_;
  SlotPhases phases_;
  int turn_ = 0;
  uint32_t turn_parity_ = 0;
  float reference_, sum_, maximum_;
};

}  // namespace flash_mla::sm100::sparse_attention_paired
