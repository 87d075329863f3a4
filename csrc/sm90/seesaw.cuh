// What the two math warpgroups of the decode kernels have in common: 64 query rows, of which each keeps one half of the
// output columns, and a reference maximum that they share through `row_max`.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/slots.cuh"
#include "device/sm90/wgmma.cuh"
#include "device/softmax.cuh"

namespace flash_mla::sm90 {

// The named barrier that orders the two warpgroups' scores; no data goes with it.
constexpr int kScores0Issued = 1;
// Joins a vote of warpgroup 1.
constexpr int kFollows = 3;

// Of a tile's 64 keys; a step of the products takes 16.
enum Keys { kAllKeys, kFirstHalf, kSecondHalf };
constexpr int first_step(Keys keys) { return keys == kSecondHalf ? 2 : 0; }
constexpr int end_step(Keys keys) { return keys == kFirstHalf ? 2 : 4; }

// `Storage` has: k[2], row_max, row_sum, row_sums_full, q_empty. `kKeepsMaximum`: the largest score of each row is kept
// besides, which the reference may be below or above.
template <class T, class Storage, bool kKeepsMaximum = false>
class SeesawWarpgroup {
 protected:
  using Atoms = WgmmaAtoms<T>;
  static constexpr int kSliceBytes = 64 * kSliceRowBytes;

  __device__ __forceinline__ SeesawWarpgroup(Storage& storage, int side)
      : storage_(storage),
        side_(side),
        thread_(threadIdx.x % 128),
        lane_(threadIdx.x % 32),
        row_(thread_ / 32 * 16 + lane_ / 4) {}

  __device__ __forceinline__ void begin_rows() {
    reference_[0] = reference_[1] = kNoMax;
    sum_[0] = sum_[1] = 0;
    if constexpr (kKeepsMaximum) {
      maximum_[0] = maximum_[1] = -INFINITY;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        output_[half][i] = 0;
      }
    }
  }

  // The reference maximum that the tile's scores ask for; true for the warp where a score of its rows outgrows the
  // present one. Else no lane asks another: beside products that take all of shared memory's bandwidth a shuffle takes
  // 150 cycles.
  __device__ __forceinline__ bool next_reference(const float (&scores)[32], float scale_log2, float (&next)[2]) {
    float largest[2];
    lane_maximum(scores, largest);
    bool outgrown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * scale_log2;
      if constexpr (kKeepsMaximum) {
        maximum_[r] = fmaxf(maximum_[r], scaled);
      }
      next[r] = reference_[r];
      outgrown |= scaled > reference_[r] + kSlack;
    }
    outgrown = __any_sync(~0u, outgrown);
    if (outgrown) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float scaled = quad_max(largest[r]) * scale_log2;
        next[r] = scaled > reference_[r] + kSlack ? scaled : reference_[r];
      }
    }
    return outgrown;
  }

  // Moves the reference maximum where a score of the tile outgrows it. No products may write the output any more.
  __device__ __forceinline__ void move_reference(const float (&scores)[32], float scale_log2) {
    float next[2];
    if (next_reference(scores, scale_log2, next)) {
      rescale(next);
    }
  }

  __device__ __forceinline__ void publish_reference() { publish_reference(reference_); }

  __device__ __forceinline__ void publish_reference(const float (&reference)[2]) {
    if (lane_ % 4 == 0) {
      storage_.row_max[row_] = reference[0];
      storage_.row_max[row_ + 8] = reference[1];
    }
  }

  __device__ __forceinline__ void rescale(const float (&next)[2]) {
    const float factor[2] = {exp2_approx(reference_[0] - next[0]), exp2_approx(reference_[1] - next[1])};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sum_[r] *= factor[r];
      reference_[r] = next[r];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        output_[half][i] *= factor[(i / 2) % 2];
      }
    }
  }

  __device__ __forceinline__ void scale_output(float factor) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 64; ++i) {
        output_[half][i] *= factor;
      }
    }
  }

  // What either warpgroup has published.
  __device__ __forceinline__ void load_reference(float (&reference)[2]) const {
    reference[0] = storage_.row_max[row_];
    reference[1] = storage_.row_max[row_ + 8];
  }

  // The other warpgroup may have moved the reference; the products into this one's output have ended.
  __device__ __forceinline__ void adopt_reference() {
    float next[2];
    load_reference(next);
    adopt_reference(next);
  }

  __device__ __forceinline__ void adopt_reference(const float (&next)[2]) {
    if (has_moved(next)) {
      rescale(next);
    }
  }

  // For any row of the warp.
  __device__ __forceinline__ bool has_moved(const float (&next)[2]) const { return __any_sync(~0u, differs(next)); }

  // For any row of the lane.
  __device__ __forceinline__ bool differs(const float (&next)[2]) const {
    return next[0] != reference_[0] || next[1] != reference_[1];
  }

  // Probabilities of 16 kFirst columns on, stored as the A operand of the other warpgroup's products.
  template <int kFirst, int kCount>
  __device__ __forceinline__ void store_probabilities(uint32_t tile, const uint32_t (&probabilities)[4 * kCount]) {
    const int row = thread_ / 32 * 16 + lane_ % 16;
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int unit = 2 * (kFirst + j) + lane_ / 16;
      store_matrix_x4(tile + row * kSliceRowBytes + ((unit ^ (row & 7)) * 16), &probabilities[4 * j]);
    }
  }

  // output += probabilities x one side's value columns of a slot, for these keys; one commit for each half of the
  // columns, unless more keys follow.
  template <int kSide, Keys kKeys = kAllKeys>
  __device__ __forceinline__ void multiply_shared(int slot, uint32_t probabilities) {
    const Descriptor values(shared_address(storage_.k[slot]), kSliceBytes), p(probabilities, 16);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = first_step(kKeys); j < end_step(kKeys); ++j) {
        wgmma_ss<typename Atoms::OutputSS>(output_[half], p.at(j * 32), values.at(values_offset(kSide, half, j)), true);
      }
      if constexpr (kKeys != kFirstHalf) {
        wgmma_commit();
      }
    }
  }

  // The same with the probabilities in registers.
  template <int kSide, Keys kKeys = kAllKeys>
  __device__ __forceinline__ void multiply_registers(int slot, const uint32_t (&probabilities)[16]) {
    const Descriptor values(shared_address(storage_.k[slot]), kSliceBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = first_step(kKeys); j < end_step(kKeys); ++j) {
        wgmma_rs<typename Atoms::OutputRS>(output_[half], &probabilities[4 * j],
                                           values.at(values_offset(kSide, half, j)), true);
      }
      if constexpr (kKeys != kFirstHalf) {
        wgmma_commit();
      }
    }
  }

  // Where in a slot 16 keys x 128 columns of the values lie, which are the first 512 columns of the keys.
  static constexpr uint32_t values_offset(int side, int half, int j) {
    return (side * 4 + half * 2) * kSliceBytes + j * 16 * kSliceRowBytes;
  }

  // What the warp has stored is there for the threads that wait.
  __device__ __forceinline__ void hand_over(uint64_t& barrier) {
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&barrier));
    }
  }

  __device__ __forceinline__ void release_q() {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.q_empty));
    }
  }

  // The rows' largest scores in this warpgroup's tiles.
  __device__ __forceinline__ void join_maximum() {
    static_assert(kKeepsMaximum);
    maximum_[0] = quad_max(maximum_[0]);
    maximum_[1] = quad_max(maximum_[1]);
  }

  // The rows' sums over both warpgroups' tiles.
  __device__ __forceinline__ void join_sums(int piece_parity, float (&total)[2]) {
    publish_sums(piece_parity);
    gather_sums(piece_parity, total);
  }

  // The same in two steps, of which the first can be made as soon as the last tile's probabilities are known.
  __device__ __forceinline__ void publish_sums(int piece_parity) {
    float* sums = storage_.row_sum[piece_parity][side_];
    sum_[0] = quad_sum(sum_[0]);
    sum_[1] = quad_sum(sum_[1]);
    if (lane_ % 4 == 0) {
      sums[row_] = sum_[0];
      sums[row_ + 8] = sum_[1];
    }
    hand_over(storage_.row_sums_full);
  }

  __device__ __forceinline__ void gather_sums(int piece_parity, float (&total)[2]) {
    mbarrier_wait(shared_address(&storage_.row_sums_full), piece_parity);
    const float* others = storage_.row_sum[piece_parity][1 - side_];
    total[0] = sum_[0] + others[row_];
    total[1] = sum_[1] + others[row_ + 8];
  }

  Storage& storage_;
  const int side_;
  const int thread_, lane_, row_;  // row_: the first of the thread's two rows, the other is 8 further
  SlotPhases phases_;
  float output_[2][64];
  float reference_[2], sum_[2];
  float maximum_[2];  // of this lane's scores in this warpgroup's tiles, base 2
};

}  // namespace flash_mla::sm90
