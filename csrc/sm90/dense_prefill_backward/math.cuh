// The math warpgroups: each has 64 keys of its own, whose gradients it keeps, and half of the columns of the gradient
// of Q.
#pragma once

#include "device/copy.cuh"
#include "sm90/dense_prefill_backward/storage.h"
#include "sm90/gradient_rows.cuh"
#include "sm90/items.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

template <class C>
class MathWarpgroup {
  using T = typename C::Element;

 public:
  __device__ __forceinline__ MathWarpgroup(const DensePrefillBackwardParams& params, Storage<C>& storage, int warpgroup)
      : params_(params), storage_(storage), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void run() {
#pragma unroll 1
    for (uint32_t number = 0;; ++number) {
      const int slot = number & 1;
      mbarrier_wait(shared_address(&storage_.item_full[slot]), number >> 1 & 1);
      const Item& item = storage_.items[slot];
      if (!item.exists()) {
        return;
      }
#pragma unroll
      for (float& sum : dk_) {
        sum = 0;
      }
#pragma unroll
      for (float& sum : dv_) {
        sum = 0;
      }
      mbarrier_wait(shared_address(&storage_.keys_full), number & 1);
      run_tiles(item);
      release(storage_.keys_empty);
      const int64_t row = static_cast<int64_t>(item.first_key) * params_.forward.h_kv + item.kv_head;
      write_gradient<T, kPrefillHeadDimV>(static_cast<T*>(params_.dv) + row * kPrefillHeadDimV,
                                          static_cast<int64_t>(params_.forward.h_kv) * kPrefillHeadDimV, key(),
                                          item.num_keys, lane(), 1.0f, dv_);
      write_gradient<T, C::kColumns>(static_cast<T*>(params_.dk) + row * C::kColumns,
                                     static_cast<int64_t>(params_.forward.h_kv) * C::kColumns, key(), item.num_keys,
                                     lane(), params_.forward.softmax_scale, dk_);
      __syncwarp();
      release(storage_.item_empty[slot]);
    }
  }

 private:
  __device__ __forceinline__ void run_tiles(const Item& item) {
    int tile = item.first_tile;
#pragma unroll 1
    for (int left = (item.end_tile() - tile) * params_.forward.group; left > 0; --left) {
      step(item, tile);
      tile = tile + 1 == item.end_tile() ? item.first_tile : tile + 1;
    }
    wgmma_wait<0>();
  }

  // The gradient of K is still being summed at the end of a step: under it the next one begins.
  __device__ __forceinline__ void step(const Item& item, int tile) {
    const int stage = step_ & 1;
    float scores[32], d_probabilities[32];
    mbarrier_wait(shared_address(&storage_.rows_full[stage]), step_ >> 1 & 1);
    wgmma_fence();
    issue_scores(scores, stage);
    if constexpr (C::kExponentsFirst == 0) {
      issue_d_probabilities(d_probabilities, stage);
      wgmma_wait<1>();
    } else {
      wgmma_wait<0>();
    }
    release(storage_.rows_empty[stage ^ 1]);  // of the step before
    if ((params_.forward.causal ? tile * C::kQueries + item.limit : item.limit) < C::kKeys) {
      mask(scores, item, tile);
    }
    uint32_t probabilities[16];
    exponentiate<0, C::kExponentsFirst>(scores, probabilities, stage);
    if constexpr (C::kExponentsFirst > 0) {
      wgmma_fence();
      issue_d_probabilities(d_probabilities, stage);
    }
    exponentiate<C::kExponentsFirst, 4>(scores, probabilities, stage);
    wgmma_fence();
    issue_value_gradient(probabilities, stage);
    wgmma_wait<1>();
    uint32_t d_scores[16];
    differentiate(d_probabilities, probabilities, d_scores, stage);
    wgmma_fence();
    issue_key_gradient<0, C::kKeyGradientFirst>(d_scores, stage);
    mbarrier_wait(shared_address(&storage_.ds_empty), step_ & 1 ^ 1);
    store_d_scores(d_scores);
    fence_async_proxy();
    wgmma_wait<C::kKeyGradientOverlaps ? 1 : 0>();
    named_barrier_sync(kDsBarrier, C::kMathThreads);
    float dq[C::kDqColumns / 2];
    wgmma_fence();
    issue_query_gradient(dq);
    issue_key_gradient<C::kKeyGradientFirst, 4>(d_scores, stage);
    wgmma_wait<1>();
    release(storage_.ds_empty);
    if (const int num_rows = item.num_queries - tile * C::kQueries; num_rows < C::kQueries) {
      clear_rows(dq, num_rows);
    }
    mbarrier_wait(shared_address(&storage_.dq_empty[warpgroup_]), step_ & 1 ^ 1);
    store_query_gradient(dq);
    fence_async_proxy();
    __syncwarp();
    release(storage_.dq_full[warpgroup_]);
    ++step_;
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[32], int stage) {
    const Descriptor k(shared_address(storage_.k) + own_keys(), 16), q(shared_address(storage_.q[stage]), 16);
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename C::Scores>(scores, k.at(C::slice_position(s) * C::kKeySliceBytes + j * 32),
                                     q.at(s * C::kQuerySliceBytes + j * 32), s + j > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_d_probabilities(float (&d_probabilities)[32], int stage) {
    const Descriptor v(shared_address(storage_.v) + own_keys(), 16), d_out(shared_address(storage_.d_out[stage]), 16);
#pragma unroll
    for (int s = 0; s < C::kValueSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename C::Scores>(d_probabilities, v.at(s * C::kKeySliceBytes + j * 32),
                                     d_out.at(s * C::kQuerySliceBytes + j * 32), s + j > 0);
      }
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_value_gradient(const uint32_t (&probabilities)[16], int stage) {
    const Descriptor d_out(shared_address(storage_.d_out[stage]), C::kQuerySliceBytes);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      wgmma_rs<typename C::ValueGradient>(dv_, &probabilities[4 * j], d_out.at(j * 16 * kSliceRowBytes), true);
    }
    wgmma_commit();
  }

  // Of queries 16 kBegin to 16 kEnd - 1.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void issue_key_gradient(const uint32_t (&d_scores)[16], int stage) {
    const Descriptor q(shared_address(storage_.q[stage]), C::kQuerySliceBytes);
#pragma unroll
    for (int j = kBegin; j < kEnd; ++j) {
      wgmma_rs<typename C::KeyGradient>(dk_, &d_scores[4 * j], q.at(j * 16 * kSliceRowBytes), true);
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_query_gradient(float (&dq)[C::kDqColumns / 2]) {
    const Descriptor ds(shared_address(storage_.ds), 16),
        k(shared_address(storage_.k) + warpgroup_ * C::kKeySliceBytes, C::dq_leading(warpgroup_));
#pragma unroll
    for (int j = 0; j < C::kKeys / 16; ++j) {
      wgmma_ss<typename C::QueryGradient>(dq, ds.at(j * 16 * kSliceRowBytes), k.at(j * 16 * kSliceRowBytes), j > 0);
    }
    wgmma_commit();
  }

  // Scores of keys that a query does not see become -inf. A thread has two keys, of which only queries from some
  // number on see anything.
  __device__ __forceinline__ void mask(float (&scores)[32], const Item& item, int tile) const {
    int first[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int unseen = key() + 8 * r - item.limit + 1;  // by so many queries
      first[r] = params_.forward.causal ? unseen - tile * C::kQueries : (unseen > 0 ? C::kQueries : 0);
      first[r] -= lane() % 4 * 2;
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      scores[i] = i / 4 * 8 + i % 2 >= first[i / 2 % 2] ? scores[i] : -INFINITY;
    }
  }

  // Probabilities of queries 16 kBegin to 16 kEnd - 1, packed as A operands of the next product, four words for 16.
  template <int kBegin, int kEnd>
  __device__ __forceinline__ void exponentiate(const float (&scores)[32], uint32_t (&probabilities)[16],
                                               int stage) const {
    const uint32_t address = shared_address(storage_.log_sums[stage]) + lane() % 4 * 8;
    const float scale = params_.forward.scale_log2;
#pragma unroll
    for (int i = 8 * kBegin; i < 8 * kEnd; i += 4) {
      const float2 log_sum = load_pair(address + i * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        probabilities[i / 2 + r] = pack2<T>(exp2_approx(fmaf(scores[i + 2 * r], scale, -log_sum.x)),
                                            exp2_approx(fmaf(scores[i + 2 * r + 1], scale, -log_sum.y)));
      }
    }
  }

  // Gradients of the scores, but for the scale, likewise packed.
  __device__ __forceinline__ void differentiate(const float (&d_probabilities)[32], const uint32_t (&probabilities)[16],
                                                uint32_t (&d_scores)[16], int stage) const {
    const uint32_t address = shared_address(storage_.deltas[stage]) + lane() % 4 * 8;
#pragma unroll
    for (int i = 0; i < 32; i += 4) {
      const float2 delta = load_pair(address + i * 8);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 probability = unpack2<T>(probabilities[i / 2 + r]);
        d_scores[i / 2 + r] = pack2<T>(probability.x * (d_probabilities[i + 2 * r] - delta.x),
                                       probability.y * (d_probabilities[i + 2 * r + 1] - delta.y));
      }
    }
  }

  // As rows of keys. Units of 16 bytes are permuted by exclusive or with the row.
  __device__ __forceinline__ void store_d_scores(const uint32_t (&d_scores)[16]) {
    const int lane = this->lane(), row = thread_row() + lane % 16;
    const uint32_t address = shared_address(storage_.ds) + (warpgroup_ * C::kWarpgroupKeys + row) * kSliceRowBytes +
                             (lane / 16 ^ row % 8) * 16;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      store_matrix_x4(address ^ j * 32, &d_scores[4 * j]);
    }
  }

  // What lies behind the sequence's last query is another sequence's, and gets zeros added.
  static __device__ __forceinline__ void clear_rows(float (&dq)[C::kDqColumns / 2], int num_rows) {
    const int row = thread_row() + lane() / 4;
#pragma unroll
    for (int i = 0; i < C::kDqColumns / 2; ++i) {
      dq[i] = row + i / 2 % 2 * 8 < num_rows ? dq[i] : 0;
    }
  }

  __device__ __forceinline__ void store_query_gradient(const float (&dq)[C::kDqColumns / 2]) {
    const int lane = this->lane(), row = thread_row() + lane / 4;
    const uint32_t address =
        shared_address(storage_.dq[warpgroup_]) + row * kSliceRowBytes + (lane % 4 / 2 ^ row % 8) * 16 + lane % 2 * 8;
#pragma unroll
    for (int i = 0; i < C::kDqColumns / 2; i += 4) {
      const uint32_t at = (address ^ i / 4 % 4 * 32) + C::dq_slice(warpgroup_, i / 16) * C::kQuerySliceBytes;
      store_pair(at, dq[i], dq[i + 1]);
      store_pair(at + 8 * kSliceRowBytes, dq[i + 2], dq[i + 3]);
    }
  }

  static __device__ __forceinline__ float2 load_pair(uint32_t address) {
    float2 pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.x), "=f"(pair.y) : "r"(address));
    return pair;
  }

  static __device__ __forceinline__ void store_pair(uint32_t address, float first, float second) {
    asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(first), "f"(second) : "memory");
  }

  __device__ __forceinline__ uint32_t own_keys() const { return warpgroup_ * C::kWarpgroupKeys * kSliceRowBytes; }

  static __device__ __forceinline__ void release(uint64_t& barrier) {
    mbarrier_arrive_if(shared_address(&barrier), lane() == 0);
  }

  // Read anew at each use: the accumulators leave no register for what special registers hold.
  static __device__ __forceinline__ int lane() {
    int lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    return lane;
  }

  // The first of the warp's 16 rows of its warpgroup.
  static __device__ __forceinline__ int thread_row() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    return thread / 32 % 4 * 16;
  }

  // Of the item: the first of the thread's two keys, the other is 8 further.
  __device__ __forceinline__ int key() const { return warpgroup_ * C::kWarpgroupKeys + thread_row() + lane() / 4; }

  static constexpr int kDsBarrier = 1;

  const DensePrefillBackwardParams& params_;
  Storage<C>& storage_;
  const int warpgroup_;
  uint32_t step_ = 0;  // counts all tiles that were met
  float dk_[C::kColumns / 2], dv_[kPrefillHeadDimV / 2];
};

}  // namespace flash_mla::sm90::dense_prefill_backward
