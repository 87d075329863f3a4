// The math warpgroups: each has 64 query rows of its own, and meets all of the item's key tiles.
#pragma once

#include "sm90/dense_prefill/epilogue.cuh"
#include "sm90/dense_prefill/items.cuh"
#include "sm90/dense_prefill/softmax.cuh"

namespace flash_mla::sm90::dense_prefill {

template <class C>
class MathWarpgroup {
  using T = typename C::Element;

 public:
  __device__ __forceinline__ MathWarpgroup(const DensePrefillParams& params, Storage<C>& storage, int warpgroup)
      : params_(params),
        storage_(storage),
        warpgroup_(warpgroup),
        lane_(threadIdx.x % 32),
        row_(warpgroup * C::kWarpgroupRows + threadIdx.x / 32 % 4 * 16 + lane_ / 4) {}

  __device__ __forceinline__ void run() {
    ItemReader items(storage_);
    for (Item item; items.next(item, lane_);) {
      begin_rows();
      if (warpgroup_ * C::kWarpgroupRows >= item.num_rows) {
        pass_tiles(item);
        continue;
      }
      if (item.num_tiles > 0) {
        run_tiles(item);
      }
      const float total[2] = {quad_sum(sum_[0]), quad_sum(sum_[1])};
      int row = row_;
      asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over items
      write_rows<T>(params_, item, row, lane_, output_, reference_, total);
    }
  }

 private:
  // The products of a turn are the scores of a tile and the output of the tile before, so that a tile's exponentials
  // are computed while the products of its predecessor and those of the other warpgroup run. No product is in flight at
  // a loop's back edge, where the compiler would have to merge accumulators: it serialises all products then.
  __device__ __forceinline__ void run_tiles(const Item& item) {
    mbarrier_wait(shared_address(&storage_.q_full[warpgroup_]), q_parity_);
    q_parity_ ^= 1;
    const int first_row = warpgroup_ * C::kWarpgroupRows;
    const int unmasked = max(params_.causal ? item.limit + first_row : item.limit, 0) / C::kKeys;
    int tile = item.num_tiles - 1;
    // At a diagonal half of the warpgroups see nothing of the first tile's second half, which is then left out.
    const int end = params_.causal ? item.limit + first_row + C::kWarpgroupRows - 1 : item.limit;
    uint32_t probabilities[C::kKeys / 4];
    if (end - tile * C::kKeys > C::kKeys / 2) {
      first_tile<2>(item, tile, tile >= unmasked, probabilities);
      --tile;
    } else {
      first_tile<1>(item, tile, true, probabilities);
      if (--tile >= 0) {
        step<true, 1>(item, tile, probabilities);
        --tile;
      }
    }
#pragma unroll 1
    for (; tile >= unmasked; --tile) {
      step<true, 2>(item, tile, probabilities);
    }
#pragma unroll 1
    for (; tile >= 0; --tile) {
      step<false, 2>(item, tile, probabilities);
    }
    mbarrier_wait(shared_address(&storage_.v_full[v_.stage]), v_.parity);
    wgmma_fence();
    issue_output<2>(probabilities);
    wgmma_wait<0>();
    release_values();
  }

  // For a warpgroup without rows, at a sequence's end.
  __device__ __forceinline__ void pass_tiles(const Item& item) {
    if (item.num_tiles > 0) {
      mbarrier_wait(shared_address(&storage_.q_full[warpgroup_]), q_parity_);
      q_parity_ ^= 1;
    }
#pragma unroll 1
    for (int tile = item.num_tiles - 1; tile >= 0; --tile) {
      mbarrier_wait(shared_address(&storage_.k_full[k_.stage]), k_.parity);
      release_keys(tile == 0);
      mbarrier_wait(shared_address(&storage_.v_full[v_.stage]), v_.parity);
      release_values();
    }
  }

  // `kHalves`: of the tile, those that a row sees some of.
  template <int kHalves>
  __device__ __forceinline__ void first_tile(const Item& item, int tile, bool masked,
                                             uint32_t (&probabilities)[C::kKeys / 4]) {
    float scores[kHalves * C::kKeys / 4];
    mbarrier_wait(shared_address(&storage_.k_full[k_.stage]), k_.parity);
    issue_scores(scores);
    wgmma_wait<0>();
    release_keys(tile == 0);
    if (masked) {
      mask(scores, item, tile);
    }
    float factor[2];
    softmax(scores, factor);
    pack_tile<T>(scores, probabilities);
#pragma unroll
    for (int i = kHalves * C::kKeys / 8; i < C::kKeys / 4; ++i) {
      probabilities[i] = 0;
    }
  }

  // `kHalves`: of the tile before, as above.
  template <bool kMasked, int kHalves>
  __device__ __forceinline__ void step(const Item& item, int tile, uint32_t (&probabilities)[C::kKeys / 4]) {
    float scores[C::kKeys / 2];
    mbarrier_wait(shared_address(&storage_.k_full[k_.stage]), k_.parity);
    mbarrier_wait(shared_address(&storage_.v_full[v_.stage]), v_.parity);
    issue_scores(scores);
    issue_output<kHalves>(probabilities);
    wgmma_wait<1>();
    release_keys(tile == 0);
    if constexpr (kMasked) {
      mask(scores, item, tile);
    }
    float factor[2];
    const bool outgrown = softmax(scores, factor);
    compute_here(scores);
    // A wait in each branch: one in front of both is moved up between the exponentials.
    if (outgrown) {
      wgmma_wait<0>();
      rescale(factor);
    } else {
      asm volatile("wgmma.wait_group.sync.aligned 0;  // and nothing else" ::: "memory");
    }
    release_values();
    pack_tile<T>(scores, probabilities);
  }

  // Left to itself the compiler computes the exponentials behind the wait that follows.
  static __device__ __forceinline__ void compute_here(float (&scores)[C::kKeys / 2]) {
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) {
      asm volatile("" : "+f"(scores[i]));
    }
  }

  __device__ __forceinline__ void begin_rows() {
    reference_[0] = reference_[1] = kNoMax;
    sum_[0] = sum_[1] = 0;
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      output_[i] = 0;
    }
  }

  template <int kScores>
  __device__ __forceinline__ void mask(float (&scores)[kScores], const Item& item, int tile) const {
    int limit[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      limit[r] = (params_.causal ? item.limit + row_ + 8 * r : item.limit) - tile * C::kKeys;
    }
    mask_tile(scores, limit, lane_);
  }

  // Scores become probabilities relative to a reference that moves where a score outgrows it; then the result is true
  // for the warp, and the output is due to be multiplied by `factor`.
  template <int kScores>
  __device__ __forceinline__ bool softmax(float (&scores)[kScores], float (&factor)[2]) {
    float largest[2];
    tile_maximum(scores, largest);
    bool outgrown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * params_.scale_log2;
      const bool grows = scaled > reference_[r] + kSlack;
      const float next = grows ? scaled : reference_[r];
      factor[r] = exp2_approx(reference_[r] - next);
      sum_[r] *= factor[r];
      reference_[r] = next;
      outgrown |= grows;
    }
    exponentiate_tile(scores, params_.scale_log2, reference_, sum_);
    return __any_sync(~0u, outgrown);
  }

  __device__ __forceinline__ void rescale(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kOutputs; ++i) {
      output_[i] *= factor[(i / 2) % 2];
    }
  }

  template <int kScores>
  __device__ __forceinline__ void issue_scores(float (&scores)[kScores]) {
    using Atom = std::conditional_t<kScores == C::kKeys / 2, typename C::Scores, typename C::HalfScores>;
    const Descriptor q(shared_address(storage_.q[warpgroup_]), 16), k(shared_address(storage_.k[k_.stage]), 16);
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<Atom>(scores, q.at(s * C::kQSliceBytes + j * 32), k.at(s * C::kKeySliceBytes + j * 32), s + j > 0);
      }
    }
    wgmma_commit();
  }

  template <int kHalves>
  __device__ __forceinline__ void issue_output(const uint32_t (&probabilities)[C::kKeys / 4]) {
    const Descriptor values(shared_address(storage_.v[v_.stage]), C::kKeySliceBytes);
#pragma unroll
    for (int j = 0; j < kHalves * C::kKeys / 32; ++j) {
      wgmma_rs<typename C::Output>(output_, &probabilities[4 * j], values.at(j * 16 * kSliceRowBytes), true);
    }
    wgmma_commit();
  }

  // `last`: of the item, so Q is not needed any more either.
  __device__ __forceinline__ void release_keys(bool last) {
    mbarrier_arrive_if(shared_address(&storage_.k_empty[k_.stage]), lane_ == 0);
    mbarrier_arrive_if(shared_address(&storage_.q_empty[warpgroup_]), lane_ == 0 && last);
    k_.advance();
  }

  __device__ __forceinline__ void release_values() {
    mbarrier_arrive_if(shared_address(&storage_.v_empty[v_.stage]), lane_ == 0);
    v_.advance();
  }

  static constexpr int kOutputs = kPrefillHeadDimV / 2;

  const DensePrefillParams& params_;
  Storage<C>& storage_;
  const int warpgroup_, lane_;
  const int row_;  // of the item: the first of the thread's two rows, the other is 8 further
  Ring<C::kStages> k_, v_;
  uint32_t q_parity_ = 0;
  float output_[kOutputs];
  float reference_[2], sum_[2];
};

}  // namespace flash_mla::sm90::dense_prefill
