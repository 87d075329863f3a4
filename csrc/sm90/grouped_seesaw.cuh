// The seesaw over key tiles that arrive and are released in groups of slices. Warpgroup 0 scores the tile in slot 0 and
// keeps output columns 0 to 255, warpgroup 1 scores slot 1 and keeps columns 256 to 511; each multiplies both tiles'
// probabilities with its half of the values: its own tile's from registers, the other's from shared memory.
#pragma once

#include "sm90/key_groups.h"
#include "sm90/seesaw.cuh"

namespace flash_mla::sm90 {

// `C` has: Element, kHasRope, kKeys, kMathThreads, kSliceBytes, and is KeyGroups. `Storage` has besides: q, k_full,
// k_empty, probabilities, probabilities_full. `Derived` has:
//   kCopiedKeys                 the slices come by copies of threads and not by TMA: a tile has one barrier, and the
//                               warpgroup that scores it orders all of it before products by one fence (a fence for
//                               each group costs 6 %)
//   load_mask()                 what `mask` reads from shared memory, which is asked for before the scores are there
//   mask(scores, facts, tile, loaded)  keys that do not count become -inf; `facts` are what the run was given
//   sums_are_final()            called between two products, as soon as no tile adds to the sums any more; can be left
//                               out
template <class Derived, class C, class Storage, bool kKeepsMaximum = false>
class GroupedSeesaw : protected SeesawWarpgroup<typename C::Element, Storage, kKeepsMaximum> {
 protected:
  using T = typename C::Element;
  using Base = SeesawWarpgroup<T, Storage, kKeepsMaximum>;
  using Base::lane_, Base::phases_, Base::reference_, Base::side_, Base::storage_, Base::sum_;
  using typename Base::Atoms;

  __device__ __forceinline__ GroupedSeesaw(Storage& storage, int side, float scale_log2)
      : Base(storage, side), scale_log2_(scale_log2) {}

  // The tiles of a piece, at least one.
  template <class Facts>
  __device__ __forceinline__ void run_steps(int num_tiles, const Facts& facts) {
    if (side_ == 0) {
      float none[32];
      run_left<false>(num_tiles, facts, none, false);
    } else {
      run_right(num_tiles, facts);
    }
  }

  // A step takes the tiles in both slots, or, at the end of a piece of odd length, the one in slot 0. No product is in
  // flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises all products then.
  // Few copies of a step are in the code, since small calls spend much of their time fetching instructions.

  // ---- warpgroup 0: scores of slot 0; both products into columns 0 to 255
  // `kAhead`: the scores of the first tile may have been issued before, to `ahead`. Without, no scores occupy registers
  // from step to step.
  template <bool kAhead, class Facts>
  __device__ __forceinline__ void run_left(int num_tiles, const Facts& facts, float (&ahead)[32], bool issued) {
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; tile += 2) {
      const bool pair = tile + 1 < num_tiles;
      float own[32];
      float (&scores)[32] = kAhead ? ahead : own;
      if (!(kAhead && issued)) {
        begin_scores(scores, pair);
      }
      issued = false;
      const auto loaded_mask = derived().load_mask();
      wgmma_wait<0>();
      if (tile + 2 >= num_tiles) {
        this->release_q();
      }
      uint32_t probabilities[16];
      softmax(scores, probabilities, facts, tile, loaded_mask);
      if (tile + 1 == num_tiles) {
        derived().sums_are_final();
      }

      wgmma_fence();
      this->template multiply_registers<0>(0, probabilities);
      wgmma_wait<1>();
      release(0, kCols0);
      wgmma_wait<0>();
      release(0, kCols128);
      phases_.advance(0);

      if (pair) {
        mbarrier_wait(shared_address(&storage_.probabilities_full[1]), phases_.parity(1));
        this->adopt_reference();
        if (tile + 2 == num_tiles) {
          derived().sums_are_final();
        }
        wait_for_values(1, kCols0);
        wgmma_fence();
        const uint32_t others = shared_address(storage_.probabilities[0]);
        this->template multiply_shared<0, kFirstHalf>(1, others);
        mbarrier_wait(shared_address(&storage_.second_half_full), phases_.parity(1));
        wgmma_fence();
        this->template multiply_shared<0, kSecondHalf>(1, others);
        wgmma_wait<1>();
        release(1, kCols0);
        wgmma_wait<0>();
        release(1, kCols128);
        phases_.advance(1);
      }
    }
  }

  // The other warpgroup may issue its scores behind these.
  __device__ __forceinline__ void begin_scores(float (&scores)[32], bool pair) {
    issue_scores<0>(scores);
    if (pair) {
      named_barrier_arrive(kScores0Issued, C::kMathThreads);
    }
  }

  // ---- warpgroup 1: scores of slot 1; both products into columns 256 to 511
  // The products of slot 0 queue behind the scores of slot 1, so that its softmax begins as soon as these are there. A
  // tile without a partner has a copy of the step of its own: where branches join while products are in flight, the
  // compiler waits for all of them.
  template <class Facts>
  __device__ __forceinline__ void run_right(int num_tiles, const Facts& facts) {
    int tile = 0;
#pragma unroll 1
    for (; tile + 1 < num_tiles; tile += 2) {
      float scores[32];
      named_barrier_sync(kScores0Issued, C::kMathThreads);
      issue_scores<1>(scores);
      const auto loaded_mask = derived().load_mask();
      follow_slot0<true>(tile == 0);
      multiply_slot0();
      wgmma_wait<2>();
      release(1, kRope);
      if (tile + 2 >= num_tiles) {
        this->release_q();
      }
      multiply_slot1_by_halves(scores, facts, tile + 1, loaded_mask, tile + 2 == num_tiles);
      wgmma_wait<1>();
      release(1, kCols256);
      wgmma_wait<0>();
      release(1, kCols384);
      phases_.advance(1);
      phases_.advance(0);
    }
    if (tile < num_tiles) {
      this->release_q();
      follow_slot0<false>(tile == 0);
      derived().sums_are_final();
      multiply_slot0();
      finish_slot0();
      phases_.advance(0);
    }
  }

  // Waits for the probabilities of slot 0 and adopts their reference. Where scores are in flight, beside which nobody
  // may touch the output, and any warp has to, the warpgroup waits for them: such a wait is for all of its warps or for
  // none.
  template <bool kBesideScores>
  __device__ __forceinline__ void follow_slot0(bool first) {
    mbarrier_wait(shared_address(&storage_.probabilities_full[0]), phases_.parity(0));
    float next[2];
    this->load_reference(next);
    if (kBesideScores ? named_barrier_any(kFollows, C::kMathThreads / 2, this->differs(next)) : this->has_moved(next)) {
      if constexpr (kBesideScores) {
        wgmma_wait<0>();
      }
      move_reference_to(next, first);
    }
  }

  __device__ __forceinline__ void multiply_slot0() {
    wait_for_values(0, kCols256);
    wgmma_fence();
    this->template multiply_shared<1>(0, probabilities0());
  }

  __device__ __forceinline__ void finish_slot0() {
    if constexpr (Derived::kCopiedKeys) {
      wgmma_wait<1>();
      release(0, kCols256);
    }
    wgmma_wait<0>();
    if constexpr (!Derived::kCopiedKeys) {
      release(0, kCols256);
    }
    release(0, kCols384);
    release(0, kRope);
  }

  // ---- the parts of a step
  // `first`: nothing depends on the old one yet.
  __device__ __forceinline__ void move_reference_to(const float (&next)[2], bool first) {
    if (Derived::kCopiedKeys && first) {  // dense decode has no registers left for the difference
      reference_[0] = next[0];
      reference_[1] = next[1];
    } else {
      this->rescale(next);
    }
  }

  // Scores of a slot, groups of slices in the order in which they arrive.
  template <int kSlot>
  __device__ __forceinline__ void issue_scores(float (&scores)[32]) {
    const Descriptor q(shared_address(storage_.q), 16), k(shared_address(storage_.k[kSlot]), 16);
    bool accumulate = false;
    if constexpr (Derived::kCopiedKeys) {
      mbarrier_wait(shared_address(&storage_.k_full[kSlot]), phases_.parity(kSlot));
      fence_async_proxy();
    }
#pragma unroll
    for (int order = 0; order < kNumGroups; ++order) {
      const int group = C::load_order(kSlot, order);
      if (C::num_slices(group) == 0) {
        continue;
      }
      if constexpr (!Derived::kCopiedKeys) {
        wait_for_keys(kSlot, group);
      }
      wgmma_fence();
#pragma unroll
      for (int s = C::first_slice(group); s < C::first_slice(group) + C::num_slices(group); ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          wgmma_ss<typename Atoms::Scores>(scores, q.at(s * C::kSliceBytes + j * 32), k.at(s * C::kSliceBytes + j * 32),
                                           accumulate);
          accumulate = true;
        }
      }
    }
    wgmma_commit();
  }

  // Scores of slot 0 -> probabilities, in registers and in shared memory.
  template <class Facts, class Mask>
  __device__ __forceinline__ void softmax(float (&scores)[32], uint32_t (&probabilities)[16], const Facts& facts,
                                          int tile, const Mask& loaded_mask) {
    derived().mask(scores, facts, tile, loaded_mask);
    float next[2], sum[2] = {};
    const bool outgrown = this->next_reference(scores, scale_log2_, next);
    make_half<0>(scores, next, sum, probabilities);
    store_half<0>(probabilities0(), probabilities);
    if (outgrown) {
      move_reference_to(next, tile == 0);
    }
    this->publish_reference();
    make_half<1>(scores, next, sum, probabilities);
    store_half<1>(probabilities0(), probabilities);
    sum_[0] += sum[0];
    sum_[1] += sum[1];
    fence_async_proxy();
    this->hand_over(storage_.probabilities_full[0]);
  }

  // The same of slot 1 while the products of slot 0 run, and its own products. The probabilities of the first 32 keys
  // are handed over before the products of slot 0 have ended, and multiplied under the exponentials of the others.
  template <class Facts, class Mask>
  __device__ __forceinline__ void multiply_slot1_by_halves(float (&scores)[32], const Facts& facts, int tile,
                                                           const Mask& loaded_mask, bool last) {
    uint32_t probabilities[16];
    const uint32_t place = shared_address(storage_.probabilities[0]);
    derived().mask(scores, facts, tile, loaded_mask);
    float next[2], sum[2] = {};
    const bool outgrown = this->next_reference(scores, scale_log2_, next);
    make_half<0>(scores, next, sum, probabilities);
    store_half<0>(place, probabilities);
    this->publish_reference(next);
    fence_async_proxy();
    this->hand_over(storage_.probabilities_full[1]);
    // Behind these stores: the compiler would else wait in front of the exponentials.
    finish_slot0();
    if (outgrown) {
      move_reference_to(next, false);
    }
    wgmma_fence();
    this->template multiply_registers<1, kFirstHalf>(1, probabilities);
    make_half<1>(scores, next, sum, probabilities);
    sum_[0] += sum[0];
    sum_[1] += sum[1];
    if (last) {
      derived().sums_are_final();
    }
    wgmma_fence();
    this->template multiply_registers<1, kSecondHalf>(1, probabilities);
    store_half<1>(place, probabilities);
    fence_async_proxy();
    this->hand_over(storage_.second_half_full);
  }

  // Probabilities of 32 keys.
  template <int kHalf>
  __device__ __forceinline__ void make_half(const float (&scores)[32], const float (&reference)[2], float (&sum)[2],
                                            uint32_t (&probabilities)[16]) {
    exponentiate<T, 2 * kHalf, 2>(scores, scale_log2_, reference, sum,
                                  reinterpret_cast<uint32_t (&)[8]>(probabilities[8 * kHalf]));
  }

  template <int kHalf>
  __device__ __forceinline__ void store_half(uint32_t place, const uint32_t (&probabilities)[16]) {
    this->template store_probabilities<2 * kHalf, 2>(place,
                                                     reinterpret_cast<const uint32_t (&)[8]>(probabilities[8 * kHalf]));
  }

  // d_qk 576: the probabilities of slot 0 lie in its RoPE slice, which is dead once it is scored. Else in two tiles by
  // turns, since the other warpgroup may still read those of the step before.
  __device__ __forceinline__ uint32_t probabilities0() const {
    if constexpr (C::kHasRope) {
      return shared_address(storage_.k[0]) + 8 * C::kSliceBytes;
    } else {
      return shared_address(storage_.probabilities[1 + phases_.parity(0)]);
    }
  }

  // The other warpgroup has seen these tiles arrive before it handed its probabilities over, and where keys are copied
  // its fence lies between the copies and these products. What TMA has written every reader waits for.
  __device__ __forceinline__ void wait_for_values(int slot, int first_group) {
    if constexpr (!Derived::kCopiedKeys) {
      wait_for_keys(slot, first_group);
      wait_for_keys(slot, first_group + 1);
    }
  }

  __device__ __forceinline__ void wait_for_keys(int slot, int group) {
    mbarrier_wait(shared_address(&storage_.k_full[slot][group]), phases_.parity(slot));
  }

  __device__ __forceinline__ void release(int slot, int group) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[slot][group]));
    }
  }

  __device__ __forceinline__ void sums_are_final() {}

  __device__ __forceinline__ Derived& derived() { return static_cast<Derived&>(*this); }

  const float scale_log2_;
};

}  // namespace flash_mla::sm90
