// Scores to probabilities where keys are the rows of a product. The accumulators of a warp hold 16 keys, and a lane has
// two of them, of all query rows that are its columns (RowFragment): so maxima and sums of a row go across lanes and
// warps, but only when the reference maximum moves and when a piece ends.
#pragma once

#include <type_traits>

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/few_rows/epilogue.cuh"
#include "device/softmax.cuh"

namespace flash_mla::inline device {

// Named barriers of the math warps.
constexpr int kScoresRead = 1;     // and whether one outgrows the reference
constexpr int kWarpsHaveTold = 2;  // each other what they know

template <class C, class Storage>
class FewRowsSoftmax {
 protected:
  using Fragment = RowFragment<C>;
  static constexpr int kOwnRows = Fragment::kOwnRows;

  __device__ __forceinline__ FewRowsSoftmax(const SparseAttentionParams& params, Storage& storage, int warp, int lane)
      : params_(params),
        storage_(storage),
        warp_(warp),
        lane_(lane),
        scale_log2_(scale_of_scores<C::kFormat>(params)) {}

  __device__ __forceinline__ void begin_rows() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      reference_[i] = kNoMax;
      sum_[i] = 0;
      maximum_[i] = -INFINITY;
    }
  }

  // Keys that do not count become -inf. A thread's keys are `key` and the one 8 further.
  __device__ __forceinline__ void mask(float (&scores)[C::kRows / 2], const PieceFacts& facts, int slot,
                                       int tile) const {
    // Those of a warp are bits in as many bytes as producer warps have them.
    using Valid = std::conditional_t<C::kWarpKeys == 8, uint16_t, uint32_t>;
    constexpr uint32_t kAllValid = C::kWarpKeys == 8 ? 0xFFFF : 0x0F0F0F0F;
    const uint32_t valid = reinterpret_cast<const Valid*>(storage_.valid[slot])[warp_];
    if (valid != kAllValid) {
      const uint32_t bits = valid >> (lane_ / 4 / C::kWarpKeys * 8 + lane_ / 4 % C::kWarpKeys);
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) {
        scores[i] = bits >> (i % 4 / 2 * (64 / C::kWarpKeys)) & 1 ? scores[i] : -INFINITY;
      }
    }
    if (params_.causal) {
      const int key = warp_ * 16 + lane_ / 4, limit = facts.limit - tile * C::kKeys;
      if (limit < C::kKeys) {
#pragma unroll
        for (int i = 0; i < C::kRows / 2; ++i) {
          const int token = Fragment::row(i / 4 * 2 + i % 2, lane_) / params_.h_q;
          scores[i] = key + i % 4 / 2 * 8 < limit + token ? scores[i] : -INFINITY;
        }
      }
    }
  }

  // Moves the reference maxima if a score of the tile outgrows one, and has the output rescaled by a factor for each
  // own row. Here all warps have read their scores.
  template <class Rescale>
  __device__ __forceinline__ void find_reference(const float (&scores)[C::kRows / 2], Rescale&& rescale_output) {
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
    named_barrier_sync(kWarpsHaveTold, C::kMathThreads);
    float factor[kOwnRows];
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      float next = reference_[i];
#pragma unroll
      for (int warp = 0; warp < C::kMathWarps; ++warp) {
        largest[i] = fmaxf(largest[i], storage_.row_max[warp][Fragment::row(i, lane_)]);
      }
      if (largest[i] > reference_[i] + kSlack) {
        next = largest[i];
      }
      factor[i] = exp2_approx(reference_[i] - next);
      sum_[i] *= factor[i];
      reference_[i] = next;
    }
    rescale_output(factor);
  }

  // Scores -> probabilities in shared memory, a row per query row.
  __device__ __forceinline__ void exponentiate(const float (&scores)[C::kRows / 2], uint32_t probabilities) {
    uint32_t packed[C::kRows / 4];
#pragma unroll
    for (int i = 0; i < C::kRows / 2; i += 2) {
      const int own = i / 4 * 2;
      const float x = exp2_approx(fmaf(scores[i], scale_log2(), -reference_[own])),
                  y = exp2_approx(fmaf(scores[i + 1], scale_log2(), -reference_[own + 1]));
      sum_[own] += x;
      sum_[own + 1] += y;
      packed[i / 2] = pack2<typename C::Element>(x, y);
    }
    // Four matrices of 8 keys x 8 query rows at a time: two groups of keys, of two groups of rows.
    const int unit = warp_ * 2 + lane_ / 8 % 2;
#pragma unroll
    for (int rows = 0; rows < C::kRows; rows += 16) {
      const int row = rows + lane_ / 16 * 8 + lane_ % 8;
      store_matrix_x4_transposed(probabilities + row * kSliceRowBytes + ((unit ^ row % 8) * 16), &packed[rows / 4]);
    }
    fence_async_proxy();
  }

  // Sums and largest scores of the piece, told to all warps; then results can be written.
  __device__ __forceinline__ void tell_sums() {
#pragma unroll
    for (int i = 0; i < kOwnRows; ++i) {
      const float sum = sum_of_lanes(sum_[i]), largest = largest_of_lanes(maximum_[i]);
      if (lane_ < 4) {
        storage_.row_sum[warp_][Fragment::row(i, lane_)] = sum;
        storage_.row_max[warp_][Fragment::row(i, lane_)] = largest;
      }
    }
    named_barrier_sync(kWarpsHaveTold, C::kMathThreads);
  }

  // Blocks of the output from `first_block` on.
  template <int kBlocks>
  __device__ __forceinline__ void write(const PieceFacts& facts, int first_block,
                                        const float (&output)[kBlocks][C::kRows / 2]) const {
    write_few_rows<C>(params_, storage_, facts, warp_, lane_, first_block, output, reference_);
  }

  // The next piece may be one without tiles, which would tell its sums at once.
  __device__ __forceinline__ void end_writing() const { named_barrier_sync(kScoresRead, C::kMathThreads); }

  // Where it is the call's it is no register.
  __device__ __forceinline__ float scale_log2() const {
    return has_one_scale(C::kFormat) ? scale_log2_ : params_.scale_log2;
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

  const SparseAttentionParams& params_;
  Storage& storage_;
  const int warp_, lane_;
  const float scale_log2_;
  float reference_[kOwnRows], sum_[kOwnRows], maximum_[kOwnRows];  // of the rows that are columns of this lane
};

}  // namespace flash_mla::inline device
