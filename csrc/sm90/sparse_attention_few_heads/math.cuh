// The math warpgroup. Keys, then columns of the values, are the rows of its products, and query rows their columns: 16
// or 32 of them cost a quarter or half of what 64 would.
#pragma once

#include "device/sm90/wgmma.cuh"
#include "device/softmax.cuh"
#include "sm90/sparse_attention_few_heads/epilogue.cuh"
#include "sm90/sparse_attention_few_heads/producer.cuh"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <class C>
class MathWarpgroup {
  using Atoms = WgmmaSwappedAtoms<C::kRows>;
  using Fragment = RowFragment<C>;
  static constexpr int kOwnRows = Fragment::kOwnRows;
  static constexpr int kBlocks = kHeadDimV / 64;  // of output columns

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage)
      : params_(params),
        storage_(storage),
        warp_(threadIdx.x / 32 % 4),
        lane_(threadIdx.x % 32),
        scale_log2_(scale_of_scores<C::kFormat>(params)) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const PieceFacts& facts = storage_.pieces[piece];
      const int num_tiles = facts.num_tiles;
      if (num_tiles < 0) {
        return;
      }
      begin_rows();
#pragma unroll 1
      for (int tile = 0; tile < num_tiles; ++tile) {
        const int slot = tile & 1;
        float scores[C::kRows / 2];
        score(slot, scores);
        mask(scores, facts, slot, tile);
        find_reference(scores);
        exponentiate(slot, scores);
        multiply(slot);
        release(slot);
      }
      finish_piece(facts);
    }
  }

 private:
  __device__ __forceinline__ void begin_rows() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      reference_[i] = kNoMax;
      sum_[i] = 0;
      maximum_[i] = -INFINITY;
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        output_[block][i] = 0;
      }
    }
  }

  __device__ __forceinline__ void score(int slot, float (&scores)[C::kRows / 2]) {
    mbarrier_wait(shared_address(&storage_.k_full[slot]), phases_.parity(slot));
    fence_async_proxy();
    const Descriptor q(shared_address(storage_.q), 16), k(tile(slot), 16);
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

  // Keys that do not count become -inf. A thread's keys are `key` and the one 8 further.
  __device__ __forceinline__ void mask(float (&scores)[C::kRows / 2], const PieceFacts& facts, int slot,
                                       int tile) const {
    const int key = warp_ * 16 + lane_ / 4;
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[slot]);
    if ((valid.x & valid.y) != ~0u) {
      const uint32_t bits = (warp_ < 2 ? valid.x : valid.y) >> (key & 31);
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        scores[i] = bits >> (i % 4 / 2 * 8) & 1 ? scores[i] : -INFINITY;
      }
    }
    if (params_.causal) {
      const int limit = facts.limit - tile * C::kKeys;
      if (limit < C::kKeys) {
#pragma unroll
        for (int i = 0; i < C::kRows / 2; ++i) {
          const int token = Fragment::row(i / 4 * 2 + i % 2, lane_) / params_.h_q;
          scores[i] = key + i % 4 / 2 * 8 < limit + token ? scores[i] : -INFINITY;
        }
      }
    }
  }

  // Moves the reference maxima if a score of the tile outgrows one. Here all warps have read their scores' operands.
  __device__ __forceinline__ void find_reference(const float (&scores)[C::kRows / 2]) {
    float largest[kOwnRows];
    bool outgrown = false;
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const int at = i / 2 * 4 + i % 2;
      largest[i] = fmaxf(scores[at], scores[at + 2]) * scale_log2();
      maximum_[i] = fmaxf(maximum_[i], largest[i]);
      outgrown |= largest[i] > reference_[i] + kSlack;
    }
    if (!named_barrier_any(kScoresRead, C::kMathThreads, outgrown)) {
      return;
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      largest[i] = largest_of_lanes(largest[i]);
      if (lane_ < 4) {
        storage_.row_max[warp_][Fragment::row(i, lane_)] = largest[i];
      }
    }
    named_barrier_sync(kProbabilitiesStored, C::kMathThreads);
    float factor[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float next = reference_[i];
#pragma unroll
      for (int warp = 0; warp < 4; ++warp) {
        largest[i] = fmaxf(largest[i], storage_.row_max[warp][Fragment::row(i, lane_)]);
      }
      if (largest[i] > reference_[i] + kSlack) {
        next = largest[i];
      }
      factor[i] = exp2_approx(reference_[i] - next);
      sum_[i] *= factor[i];
      reference_[i] = next;
    }
#pragma unroll
    for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        output_[block][i] *= factor[i / 4 * 2 + i % 2];
      }
    }
  }

  // Over the lanes that hold other keys.
  static __device__ __forceinline__ float largest_of_lanes(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      x = fmaxf(x, __shfl_xor_sync(~0u, x, mask));
    }
    return x;
  }

  static __device__ __forceinline__ float sum_of_lanes(float x) {
#pragma unroll
    for (int mask = 4; mask < 32; mask *= 2) {
      x += __shfl_xor_sync(~0u, x, mask);
    }
    return x;
  }

  // Scores -> probabilities in shared memory, a row per query row, for all warps.
  __device__ __forceinline__ void exponentiate(int slot, const float (&scores)[C::kRows / 2]) {
    uint32_t packed[C::kRows / 4];
#pragma unroll
    for (int i = 0; i < C::kRows / 2; i += 2) {
      const int own = i / 4 * 2;
      const float x = exp2_approx(fmaf(scores[i], scale_log2(), -reference_[own])),
                  y = exp2_approx(fmaf(scores[i + 1], scale_log2(), -reference_[own + 1]));
      sum_[own] += x;
      sum_[own + 1] += y;
      packed[i / 2] = pack2<__nv_bfloat16>(x, y);
    }
    // Four matrices of 8 keys x 8 query rows at a time: two groups of keys, of two groups of rows.
    const int unit = warp_ * 2 + lane_ / 8 % 2;
#pragma unroll
    for (int rows = 0; rows < C::kRows; rows += 16) {
      const int row = rows + lane_ / 16 * 8 + lane_ % 8;
      store_matrix_x4_transposed(probabilities(slot) + row * kSliceRowBytes + ((unit ^ row % 8) * 16),
                                 &packed[rows / 4]);
    }
    fence_async_proxy();
    named_barrier_sync(kProbabilitiesStored, C::kMathThreads);
  }

  __device__ __forceinline__ void multiply(int slot) {
    const Descriptor values(tile(slot), C::kSliceBytes), p(probabilities(slot), 16);
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
  }

  __device__ __forceinline__ uint32_t tile(int slot) const {
    return shared_address(storage_.k[0]) + slot * C::kTileBytes;
  }

  __device__ __forceinline__ uint32_t probabilities(int slot) const {
    if constexpr (C::kRopeBehindValues) {
      return tile(slot) + C::kRopeSlice * C::kSliceBytes;
    } else {
      return shared_address(storage_.probabilities);
    }
  }

  __device__ __forceinline__ void finish_piece(const PieceFacts& facts) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const float sum = sum_of_lanes(sum_[i]), largest = largest_of_lanes(maximum_[i]);
      if (lane_ < 4) {
        storage_.row_sum[warp_][Fragment::row(i, lane_)] = sum;
        storage_.row_max[warp_][Fragment::row(i, lane_)] = largest;
      }
    }
    named_barrier_sync(kProbabilitiesStored, C::kMathThreads);
    if constexpr (has_one_scale(C::kFormat)) {
      const float descale = descale_of_output<C::kFormat>(params_);
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
#pragma unroll
        for (int i = 0; i < C::kRows / 2; ++i) {
          output_[block][i] *= descale;
        }
      }
    }
    write_piece<C>(params_, storage_, facts, warp_, lane_, output_, reference_);
    // The next piece may be one without tiles, which would write the sums at once.
    named_barrier_sync(kScoresRead, C::kMathThreads);
  }

  // Where it is the call's it is no register.
  __device__ __forceinline__ float scale_log2() const {
    return has_one_scale(C::kFormat) ? scale_log2_ : params_.scale_log2;
  }

  const SparseAttentionParams& params_;
  Storage<C>& storage_;
  const int warp_, lane_;
  const float scale_log2_;
  SlotPhases phases_;
  float output_[kBlocks][C::kRows / 2];
  float reference_[kOwnRows], sum_[kOwnRows], maximum_[kOwnRows];  // of the rows that are columns of this lane
};

}  // namespace flash_mla::sm90::sparse_attention_few_heads
