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
  using Base::kOwnRows, Base::lane_, Base::params_, Base::reference_, Base::storage_, Base::warp_;
  using Fragment = typename Base::Fragment;
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
        bulk_wait_read<0>();
        return;
      }
      begin_output();
      if (!C::kCopied && num_tiles == 0) {  // takes its turn with the slots, unread
        wait_for_keys(next_slot_);
        release(next_slot_);
      }
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int slot = C::kCopied ? tile & 1 : next_slot_;
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

  __device__ __forceinline__ void wait_for_keys(int slot) const {
    mbarrier_wait(shared_address(&storage_.k_full[slot]), phases_.parity(slot));
  }

  __device__ __forceinline__ void score(int slot, float (&scores)[C::kRows / 2]) {
    wait_for_keys(slot);
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
    next_slot_ = slot ^ 1;
  }

  __device__ __forceinline__ void finish_piece(const PieceFacts& facts) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
    if (warp_ == 0 && lane_ < 4) {
#pragma unroll
      for (int i = 0; i < kOwnRows; ++i) {
        storage_.staging.reference[Fragment::row(i, lane_)] = reference_[i];
      }
    }
    this->tell_sums();
    if (facts.partial < 0) {
      write_rows(facts);
    } else {
      write_few_rows<C, true>(params_, storage_, facts, warp_, lane_, 0, output_, reference_);
      this->end_writing();
    }
  }

  // The rows of a whole request: scaled and transposed into shared memory, and from there in one copy each. A lane of
  // the first warp has a row.
  __device__ __forceinline__ void write_rows(const PieceFacts& facts) {
    auto& results = storage_.staging;
    const bool has_row = warp_ == 0 && lane_ < C::kRows;
    bool exists = false;
    typename C::Element* out;
    if (has_row) {
      const RowPlace place(params_, facts, lane_);
      const RowResult result = row_result<C>(storage_, lane_, results.reference[lane_]);
      const bool any_key = result.sum != 0;
      float sum = result.sum;
      exists = place.exists;
      if (params_.attn_sink && exists) {
        sum += exp2f(params_.attn_sink[place.head] * kLog2E - result.reference);
      }
      results.scale[lane_] = any_key ? descale_of_output<C::kFormat>(params_) / sum : 0.0f;
      out = static_cast<typename C::Element*>(params_.out) + place.batch * params_.stride_out_b +
            place.token * params_.stride_out_s + place.head * params_.stride_out_h;
      if (exists) {
        const float lse = result.reference + log2f(result.sum);
        const int64_t offset = place.offset(params_);
        params_.lse[offset] = any_key ? (params_.lse_base2 ? lse : lse * kLn2) : INFINITY;
        if (params_.max_logits != nullptr) {
          params_.max_logits[offset] = result.maximum * kLn2;
        }
      }
      bulk_wait_read<0>();  // of the rows of the piece before
    }
    named_barrier_sync(kScoresRead, C::kMathThreads);
    float scale[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      scale[i] = results.scale[Fragment::row(i, lane_)];
    }
    const uint32_t corner = shared_address(results.rows[lane_ / 16 * 8 + lane_ % 8]) + (warp_ * 2 + lane_ / 8 % 2) * 16;
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
      uint32_t packed[C::kRows / 4];
#pragma unroll
      for (int i = 0; i < C::kRows / 2; i += 2) {
        const int own = i / 4 * 2;
        packed[i / 2] =
            pack2<typename C::Element>(output_[block][i] * scale[own], output_[block][i + 1] * scale[own + 1]);
      }
#pragma unroll
      for (int rows = 0; rows < C::kRows; rows += 16) {
        store_matrix_x4_transposed(corner + rows * static_cast<int>(sizeof(results.rows[0])) + block * 128,
                                   &packed[rows / 4]);
      }
    }
    fence_async_proxy();
    named_barrier_sync(kWarpsHaveTold, C::kMathThreads);
    if (has_row) {
      if (exists) {
        bulk_store(out, shared_address(results.rows[lane_]), kHeadDimV * 2);
      }
      bulk_commit();
    }
  }

  SlotPhases phases_;
  int next_slot_ = 0;  // of rows that are not copied
  float output_[kBlocks][C::kRows / 2];
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
