// The math warpgroups. The first one has the scores and probabilities, the second one their gradients; then each has
// half of the columns of both gradients: that of q stays in registers, that of a tile's keys goes to its sums.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/numeric.cuh"
#include "device/softmax.cuh"
#include "sm90/gradient_rows.cuh"
#include "sm90/sparse_prefill_backward/items.cuh"
#include "sm90/sparse_prefill_backward/scatter.cuh"
#include "sm90/sparse_prefill_backward/storage.h"

namespace flash_mla::sm90::sparse_prefill_backward {

template <class C, int kWarpgroup>
class MathWarpgroup {
  using T = __nv_bfloat16;
  static constexpr int kFirstSlice = C::first_slice(kWarpgroup);
  static constexpr int kNumSlices = C::num_slices(kWarpgroup);
  static constexpr bool kHasLast = kNumSlices > C::kFirstSlices;  // d_qk 576: a fifth slice

 public:
  __device__ __forceinline__ MathWarpgroup(const SparsePrefillBackwardParams& params, Storage<C>& storage)
      : params_(params), storage_(storage) {}

  __device__ __forceinline__ void run() {
    for_items<C>(params_, [&](const Item& item) {
      clear(dq_);
      clear(last_dq_);
      if (item.length > 0) {
        load_row_terms(item);
        mbarrier_wait(shared_address(&storage_.q_full), parities_ >> 1);
#pragma unroll 1
        for (int left = item.length; left > 0; left -= C::kKeys) {
          step(left <= C::kKeys);
        }
        parities_ ^= 2;
      }
      write(item);
    });
  }

 private:
  // Of one of the thread's two rows.
  __device__ __forceinline__ BackwardRow row_terms(const Item& item, int r) const {
    const int head = item.first_head + row() + 8 * r;
    if (head >= params_.h_q) {
      return {INFINITY, 0, 0, 0};
    }
    const int64_t at = static_cast<int64_t>(item.token) * params_.h_q + head;
    const float4 words = *reinterpret_cast<const float4*>(params_.rows + at);
    return {words.x, words.y, words.z, words.w};
  }

  __device__ __forceinline__ void load_row_terms(const Item& item) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const BackwardRow terms = row_terms(item, r);
      terms_[r][0] = kWarpgroup == 0 ? terms.log_sum : terms.share * params_.softmax_scale;
      terms_[r][1] = kWarpgroup == 0 ? terms.share : terms.offset * params_.softmax_scale;
    }
  }

  __device__ __forceinline__ void step(bool last) {
    const uint32_t parity = parities_ & 1;
    if constexpr (kWarpgroup == 0) {
      compute_probabilities(parity);
    } else {
      compute_d_scores(parity);
    }
    named_barrier_sync(kDScoresReady, C::kMathThreads);
    wgmma_fence();
    issue_query_gradient();
    multiply_keys<0>(parity, last);
    parities_ ^= 1;
  }

  // Slice after slice of the gradients of the tile's keys.
  template <int kSlice>
  __device__ __forceinline__ void multiply_keys(uint32_t parity, bool last) {
    if constexpr (kSlice < kNumSlices) {
      float sums[32];
      if constexpr (kSlice > 0) {
        wgmma_fence();
      }
      issue_key_gradient<kFirstSlice + kSlice>(sums);
      if constexpr (kSlice == 0) {
        wgmma_wait<1>();
        release(storage_.k_empty[kWarpgroup], true);
      }
      wgmma_wait<0>();
      if constexpr (kSlice == kNumSlices - 1) {
        release(storage_.probabilities_empty, true);
        release(storage_.q_empty, last);
      }
      scatter<C>(params_, storage_.slots[parity], row(), lane(), (kFirstSlice + kSlice) * kSliceColumns, sums);
      multiply_keys<kSlice + 1>(parity, last);
    }
  }

  __device__ __forceinline__ void wait_for_keys(uint32_t parity) {
#pragma unroll
    for (int group = 0; group < C::kWarpgroups; ++group) {
      mbarrier_wait(shared_address(&storage_.k_full[group]), parity);
    }
    fence_async_proxy();
  }

  __device__ __forceinline__ void compute_probabilities(uint32_t parity) {
    float scores[32];
    wait_for_keys(parity);
    wgmma_fence();
    const Descriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.k), 16);
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t at = s * C::kSliceBytes + j * 32;
        wgmma_ss<typename C::Scores>(scores, q.at(at), k.at(at), s + j > 0);
      }
    }
    wgmma_commit();
    mbarrier_wait(shared_address(&storage_.probabilities_empty), parity ^ 1);
    wgmma_wait<0>();
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[parity]);
    if ((valid.x & valid.y) != ~0u) {
      mask_keys(scores, valid.x, valid.y, lane());
    }
    const float scale = params_.scale_log2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t plain[4], shared[4];
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int i = 8 * j + 2 * word, r = word % 2;
        const float p0 = exp2_approx(fmaf(scores[i], scale, -terms_[r][0])),
                    p1 = exp2_approx(fmaf(scores[i + 1], scale, -terms_[r][0]));
        plain[word] = pack2<T>(p0, p1);
        shared[word] = pack2<T>(p0 * terms_[r][1], p1 * terms_[r][1]);
      }
      store_matrix_x4(fragment_address(storage_.d_scores, j), plain);
      store_matrix_x4(fragment_address(storage_.probabilities, j), shared);
    }
    fence_async_proxy();
    named_barrier_arrive(kProbabilitiesReady, 256);
  }

  __device__ __forceinline__ void compute_d_scores(uint32_t parity) {
    float d_probabilities[32];
    wait_for_keys(parity);
    wgmma_fence();
    const Descriptor d_out(shared_address(storage_.d_out), 16), k(shared_address(storage_.k), 16);
#pragma unroll
    for (int s = 0; s < C::kValueSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t at = s * C::kSliceBytes + j * 32;
        wgmma_ss<typename C::Scores>(d_probabilities, d_out.at(at), k.at(at), s + j > 0);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();
    named_barrier_sync(kProbabilitiesReady, 256);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t address = fragment_address(storage_.d_scores, j);
      uint32_t words[4];
      load_matrix_x4(address, words);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int i = 8 * j + 2 * word, r = word % 2;
        const float2 probability = unpack2<T>(words[word]);
        words[word] = pack2<T>(probability.x * fmaf(d_probabilities[i], terms_[r][0], terms_[r][1]),
                               probability.y * fmaf(d_probabilities[i + 1], terms_[r][0], terms_[r][1]));
      }
      store_matrix_x4(address, words);
    }
    fence_async_proxy();
  }

  // The lane's row of 16 keys of a tile of 64 heads x 64 keys.
  __device__ __forceinline__ uint32_t fragment_address(const unsigned char* tile, int j) const {
    const int lane = this->lane(), row = warp_row() + lane % 16, unit = 2 * j + lane / 16;
    return shared_address(tile) + row * kSliceRowBytes + ((unit ^ row % 8) * 16);
  }

  __device__ __forceinline__ void issue_query_gradient() {
    const Descriptor d_scores(shared_address(storage_.d_scores), 16),
        k(shared_address(storage_.k) + kFirstSlice * C::kSliceBytes, C::kSliceBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t rows = j * 16 * kSliceRowBytes;
      wgmma_ss<typename C::QueryGradient>(dq_, d_scores.at(j * 32), k.at(rows), true);
      if constexpr (kHasLast) {
        wgmma_ss<typename C::LastQueryGradient>(last_dq_, d_scores.at(j * 32),
                                                k.at(C::kFirstSlices * C::kSliceBytes + rows), true);
      }
    }
    wgmma_commit();
  }

  template <int kSlice>
  __device__ __forceinline__ void issue_key_gradient(float (&sums)[32]) {
    const Descriptor d_scores(shared_address(storage_.d_scores), 16), q(shared_address(storage_.q), 16),
        probabilities(shared_address(storage_.probabilities), 16), d_out(shared_address(storage_.d_out), 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const uint32_t rows = j * 16 * kSliceRowBytes;
      wgmma_ss<typename C::KeyGradient>(sums, d_scores.at(rows), q.at(kSlice * C::kSliceBytes + rows), j > 0);
    }
    if constexpr (kSlice < C::kValueSlices) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const uint32_t rows = j * 16 * kSliceRowBytes;
        wgmma_ss<typename C::KeyGradient>(sums, probabilities.at(rows), d_out.at(kSlice * C::kSliceBytes + rows), true);
      }
    }
    wgmma_commit();
  }

  // A token without keys has no gradient, whatever is in its d_out.
  __device__ __forceinline__ void write(const Item& item) {
    if (row_terms(item, 0).log_sum == INFINITY && row_terms(item, 1).log_sum == INFINITY) {
      clear(dq_);
      clear(last_dq_);
    }
    const int64_t first = static_cast<int64_t>(item.token) * params_.h_q + item.first_head;
    T* const rows = static_cast<T*>(params_.dq) + first * C::kColumns + kFirstSlice * kSliceColumns;
    const int num_rows = params_.h_q - item.first_head;
    write_gradient<T, 256>(rows, C::kColumns, row(), num_rows, lane(), 1.0f, dq_);
    if constexpr (kHasLast) {
      write_gradient<T, 64>(rows + 256, C::kColumns, row(), num_rows, lane(), 1.0f, last_dq_);
    }
  }

  template <int kCount>
  static __device__ __forceinline__ void clear(float (&sums)[kCount]) {
#pragma unroll
    for (float& sum : sums) {
      sum = 0;
    }
  }

  __device__ __forceinline__ void release(uint64_t& barrier, bool condition) {
    mbarrier_arrive_if(shared_address(&barrier), condition && lane() == 0);
  }

  // Read anew at each use: the accumulators leave no register for what special registers hold.
  static __device__ __forceinline__ int lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  // The first of the warp's 16 rows.
  static __device__ __forceinline__ int warp_row() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread / 32 % 4 * 16;
  }

  // The first of the thread's two rows, the other is 8 further.
  static __device__ __forceinline__ int row() { return warp_row() + lane() / 4; }

  static constexpr int kProbabilitiesReady = 1, kDScoresReady = 2;

  const SparsePrefillBackwardParams& params_;
  Storage<C>& storage_;
  uint32_t parities_ = 0;  // of the tile and of the item
  float terms_[2][2];      // of each of the thread's two rows: {log_sum, share} or {share * scale, offset * scale}
  float dq_[128], last_dq_[kHasLast ? 32 : 1];
};

}  // namespace flash_mla::sm90::sparse_prefill_backward
