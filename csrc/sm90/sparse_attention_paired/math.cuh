// The two math warpgroups. Warpgroup 0 scores a tile, finds its probabilities and keeps output columns 0 to 255;
// warpgroup 1 keeps columns 256 to 511. Each multiplies the probabilities, from registers, with its half of the values.
#pragma once

#include "device/cluster.cuh"
#include "device/sparse/epilogue.cuh"
#include "device/sparse/row_writer.cuh"
#include "device/sparse/walk.h"
#include "sm90/seesaw.cuh"
#include "sm90/sparse_attention_paired/storage.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C>
class MathWarpgroup : SeesawWarpgroup<__nv_bfloat16, Storage<C>, true> {
  using T = __nv_bfloat16;
  using Base = SeesawWarpgroup<T, Storage<C>, true>;
  using Base::lane_, Base::maximum_, Base::output_, Base::reference_, Base::row_, Base::side_, Base::storage_,
      Base::sum_, Base::thread_;
  using typename Base::Atoms;

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int side)
      : Base(storage, side),
        params_(params),
        to_peer_(peer_address(shared_address(storage.q)) - shared_address(storage.q)) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const int num_tiles = storage_.pieces[piece].num_tiles;
      if (num_tiles < 0) {
        return;
      }
      this->begin_rows();
      if (num_tiles <= side_) {
        this->release_q();
      }
      multiply_tiles(num_tiles, piece);
      finish_piece(piece);
    }
  }

 private:
  // No product is in flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises
  // all products then.
  __device__ __forceinline__ void multiply_tiles(int num_tiles, int piece) {
    bool first = side_ == 0;
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      float scores[32];
      if (first) {
        score_tile(scores);
        first = false;
      } else if (tile + 1 < num_tiles) {
        score_next_and_multiply(scores);
        ++tile;
      } else {
        multiply_last();
        return;
      }
      if (tile + 2 >= num_tiles) {
        this->release_q();
      }
      find_reference(scores, piece, tile);
      uint32_t probabilities[16];
      find_probabilities(scores, probabilities);
      multiply(probabilities);
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
    tile_parity_ ^= 1;
  }

  __device__ __forceinline__ void wait_for_quarter(int quarter) {
    const Place place = place_of(quarter);
    mbarrier_wait(shared_address(&storage_.k_full[place.index]), place.parity);
  }

  // ---- scores of the present tile, or of the one behind it (`tile` is kQuarters), by quarters as they arrive
  template <int kQuarter>
  __device__ __forceinline__ void score_quarter(float (&scores)[32], int tile) {
    uint32_t q_address = shared_address(storage_.q);
    asm volatile("" : "+r"(q_address));  // else the compiler keeps a descriptor for each slice
    const Descriptor q(q_address, 16), k(address_of(tile + kQuarter), 16);
    wait_for_quarter(tile + kQuarter);
    fence_async_proxy();
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::Scores>(scores, q.at((2 * kQuarter + i) * C::kSliceBytes + j * 32),
                                         k.at(i * C::kSliceBytes + j * 32), kQuarter + i + j > 0);
      }
    }
    if constexpr (C::kRopeBehindValues && kQuarter + 1 == C::kQuarters) {
      const Descriptor rope(shared_address(storage_.tail), 16);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::Scores>(scores, q.at(C::kRopeSlice * C::kSliceBytes + j * 32), rope.at(j * 32), true);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void score_tile(float (&scores)[32]) {
    score_quarter<0>(scores, 0);
    score_quarter<1>(scores, 0);
    score_quarter<2>(scores, 0);
    score_quarter<3>(scores, 0);
    wgmma_wait<0>();
  }

  // The tile behind the present one is scored around the products of this one, whose scores the other warpgroup has
  // found: so a ring of less than two tiles suffices, since the places of this one are free for the second half.
  __device__ __forceinline__ void score_next_and_multiply(float (&scores)[32]) {
    wait_for_values();
    score_quarter<0>(scores, C::kQuarters);
    score_quarter<1>(scores, C::kQuarters);
    uint32_t probabilities[16];
    receive_probabilities(probabilities);
    issue_products(probabilities);
    release_tail();
    wgmma_wait<1>();
    release_half(0);
    score_quarter<2>(scores, C::kQuarters);
    wgmma_wait<1>();
    release_half(1);
    score_quarter<3>(scores, C::kQuarters);
    wgmma_wait<0>();
    next_tile();
  }

  static __device__ __forceinline__ uint32_t bytes(const uint4& words) {
    return words.x | words.y << 8 | words.z << 16 | words.w << 24;
  }

  // Masks the scores and moves the reference maximum where one outgrows it.
  __device__ __forceinline__ void find_reference(float (&scores)[32], int piece, int tile) {
    const uint4 first = *reinterpret_cast<const uint4*>(&storage_.valid[tile_parity_][0]),
                second = *reinterpret_cast<const uint4*>(&storage_.valid[tile_parity_][4]);
    if ((first.x & first.y & first.z & first.w & second.x & second.y & second.z & second.w) != 0xff) {
      mask_keys(scores, bytes(first), bytes(second), lane_);
    }
    if (params_.causal) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = storage_.pieces[piece].limit - tile * C::kKeys +
                   (storage_.pieces[piece].row_tile * C::kRows + cluster_rank() * kRowTile + row_ + 8 * r) / params_.h_q;
      }
      if (limit[0] < C::kKeys || limit[1] < C::kKeys) {
        mask_scores(scores, limit, lane_);
      }
    }
    this->move_reference(scores, params_.scale_log2, [] {});
    this->publish_reference();
  }

  // Scores -> probabilities, as operands of this warpgroup's products and in shared memory for the other one.
  __device__ __forceinline__ void find_probabilities(const float (&scores)[32], uint32_t (&probabilities)[16]) {
    exponentiate<T, 0, 4>(scores, params_.scale_log2, reference_, sum_, probabilities);
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

  // Those that the other warpgroup has found.
  __device__ __forceinline__ void receive_probabilities(uint32_t (&probabilities)[16]) {
    mbarrier_wait(shared_address(&storage_.probabilities_full), tile_parity_);
    load_probabilities(probabilities);
    this->adopt_reference();
  }

  // ---- products of the present tile, into this warpgroup's columns: from two quarters, which are handed back when
  // their products have ended
  __device__ __forceinline__ void wait_for_values() {
    wait_for_quarter(2 * side_);
    wait_for_quarter(2 * side_ + 1);
  }

  __device__ __forceinline__ void issue_products(const uint32_t (&probabilities)[16]) {
    wgmma_fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Descriptor values(address_of(2 * side_ + half), C::kSliceBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_rs<typename Atoms::OutputRS>(output_[half], &probabilities[4 * j], values.at(j * 16 * kSliceRowBytes),
                                           true);
      }
      wgmma_commit();
    }
  }

  __device__ __forceinline__ void multiply(const uint32_t (&probabilities)[16]) {
    issue_products(probabilities);
    wgmma_wait<1>();
    release_half(0);
    wgmma_wait<0>();
    release_half(1);
    next_tile();
  }

  __device__ __forceinline__ void multiply_last() {
    wait_for_values();
    fence_async_proxy();
    uint32_t probabilities[16];
    receive_probabilities(probabilities);
    multiply(probabilities);
    release_tail();
  }

  // The probabilities have been read; without RoPE columns a warp stores there what it alone reads next.
  __device__ __forceinline__ void release_tail() {
    if constexpr (C::kRopeBehindValues) {
      release(storage_.tail_empty);
    }
  }

  __device__ __forceinline__ void release_half(int half) {
    release(storage_.k_empty[place_of(2 * side_ + half).index]);
  }

  // In both CTAs.
  __device__ __forceinline__ void release(uint64_t& barrier) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&barrier));
      mbarrier_arrive_peer(shared_address(&barrier) + to_peer_);
    }
  }

  __device__ __forceinline__ void finish_piece(int piece) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    PieceFacts facts = storage_.pieces[piece];
    facts.row_tile = facts.row_tile * C::kRanks + cluster_rank();
    if (params_.max_logits != nullptr) {
      this->join_maximum();
      if (side_ == 1 && lane_ % 4 == 0) {
        storage_.row_maximum[piece][row] = maximum_[0];
        storage_.row_maximum[piece][row + 8] = maximum_[1];
      }
    }
    float total[2];
    this->join_sums(piece, total);
    if (params_.max_logits != nullptr && side_ == 0) {
      maximum_[0] = fmaxf(maximum_[0], storage_.row_maximum[piece][row]);
      maximum_[1] = fmaxf(maximum_[1], storage_.row_maximum[piece][row + 8]);
    }
    if (facts.partial >= 0) {
      write_partial(params_, facts, side_, side_ == 0, row, lane_, output_, reference_, total);
    } else {
      const RowWriter writer(params_, facts, side_, row, lane_, reference_, total, maximum_);
      writer.write<0>(output_[0]);
      writer.write<1>(output_[1]);
    }
  }

  const SparseAttentionParams& params_;
  const uint32_t to_peer_;  // from an address in shared memory to the same one of the other CTA
  int first_place_ = 0;  // of the tile
  uint32_t parity_ = 0;  // of that place
  uint32_t tile_parity_ = 0;
};

}  // namespace flash_mla::sm90::sparse_attention
