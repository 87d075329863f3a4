// The two math warpgroups. Each has one of the pair's row tiles, and of its output the CTA's half of the columns.
// Scores are sums over columns, so each CTA computes a part of them. It receives the other's part for its half of a
// tile's keys, and the two exchange the probabilities.
#pragma once

#include "sm90/seesaw.cuh"
#include "sm90/sparse_attention/epilogue.cuh"
#include "sm90/sparse_attention_paired/storage.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C>
class MathWarpgroup : SeesawWarpgroup<__nv_bfloat16, Storage<C>, true> {
  using T = __nv_bfloat16;
  using Base = SeesawWarpgroup<T, Storage<C>, true>;
  using Base::lane_, Base::maximum_, Base::output_, Base::reference_, Base::row_, Base::storage_, Base::sum_,
      Base::thread_;
  using typename Base::Atoms;

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int row_tile)
      : Base(storage, row_tile), params_(params), row_tile_(row_tile) {}

  __device__ __forceinline__ void run() {
    for (uint32_t piece = 0;; piece ^= 1) {
      mbarrier_wait(shared_address(&storage_.q_full), piece);
      fence_async_proxy();
      const int num_tiles = storage_.pieces[piece].num_tiles;
      if (num_tiles < 0) {
        return;
      }
      this->begin_rows();
      if (num_tiles == 0) {
        this->release_q();
      } else {
        run_tiles(num_tiles, piece);
      }
      finish_piece(piece);
    }
  }

 private:
  // A step sends the part of the next tile's scores that the other CTA needs before it multiplies the last tile's
  // probabilities, so that neither CTA waits for what is on its way. No product is in flight at a loop's back edge,
  // where the compiler would have to merge accumulators: it serialises all products then.
  __device__ __forceinline__ void run_tiles(int num_tiles, int piece) {
    Ring<C::kStages> ahead = keys_;
    float scores[16];  // of this CTA's half of the keys
    uint32_t own[8];   // probabilities of the same, of the tile before
#pragma unroll 1
    for (int tile = 0; tile <= num_tiles; ++tile) {
      if (tile < num_tiles) {
        compute_scores(scores, ahead);
        ahead.advance();
        if (tile + 1 == num_tiles) {
          this->release_q();
        }
      }
      if (tile > 0) {
        multiply(own, tile == num_tiles);
      }
      if (tile < num_tiles) {
        add_peer_scores(scores);
        mask(scores, piece, tile, (keys_.stage));
        move_reference(scores);
        exponentiate<T, 0, 2>(scores, params_.scale_log2, reference_, sum_, own);
        send_probabilities(own, tile + 1 == num_tiles);
      }
    }
  }

  // This CTA's part of a tile's scores; the half that the other one needs goes there.
  __device__ __forceinline__ void compute_scores(float (&kept)[16], const Ring<C::kStages>& at) {
    mbarrier_wait(shared_address(&storage_.k_full[at.stage][kValues]), at.parity);
    if constexpr (C::kHasRope) {
      mbarrier_wait(shared_address(&storage_.k_full[at.stage][kRope]), at.parity);
    }
    fence_async_proxy();
    const uint32_t q_tile = shared_address(storage_.q[row_tile_]), k_tile = shared_address(storage_.k[at.stage]);
    const Descriptor q(q_tile, 16), k(k_tile, 16);
    float scores[32];
    wgmma_fence();
#pragma unroll
    for (int s = 0; s < C::kSlices; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        wgmma_ss<typename Atoms::Scores>(scores, q.at(s * C::kSliceBytes + j * 32), k.at(s * C::kSliceBytes + j * 32),
                                         s + j > 0);
      }
    }
    if constexpr (C::kRopeBehindValues) {
      const Descriptor64 q_rope(q_tile + C::kRopeOffset), k_rope(k_tile + C::kRopeOffset);
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        wgmma_ss<typename Atoms::Scores>(scores, q_rope.at(j * 32), k_rope.at(j * 32), true);
      }
    }
    wgmma_commit();
    wgmma_wait<0>();

    mbarrier_wait(shared_address(&storage_.peer_scores_read[row_tile_]), scores_parity_ ^ 1);
    const uint32_t barrier = peer_address(shared_address(&storage_.scores_full[row_tile_])),
                   destination = peer_address(shared_address(&storage_.scores[row_tile_][0][thread_]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* sent = &scores[16 + 4 * i];
      store_peer(destination + i * sizeof(storage_.scores[0][0]), __float_as_uint(sent[0]), __float_as_uint(sent[1]),
                 __float_as_uint(sent[2]), __float_as_uint(sent[3]), barrier);
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      kept[i] = scores[i];
    }
  }

  __device__ __forceinline__ void add_peer_scores(float (&scores)[16]) {
    expect(storage_.scores_full[row_tile_], sizeof(storage_.scores[0]));
    mbarrier_wait(shared_address(&storage_.scores_full[row_tile_]), scores_parity_);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 part = storage_.scores[row_tile_][i][thread_];
      scores[4 * i] += part.x;
      scores[4 * i + 1] += part.y;
      scores[4 * i + 2] += part.z;
      scores[4 * i + 3] += part.w;
    }
    __syncwarp();
    if (lane_ == 0) {
      mbarrier_arrive_peer(peer_address(shared_address(&storage_.peer_scores_read[row_tile_])));
    }
    scores_parity_ ^= 1;
  }

  // Keys that do not count become -inf.
  __device__ __forceinline__ void mask(float (&scores)[16], int piece, int tile, int stage) const {
    const uint32_t valid = *reinterpret_cast<const uint32_t*>(storage_.valid[stage]);
    if (valid != ~0u) {
      mask_keys(scores, valid, 0, lane_);
    }
    if (params_.causal) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = storage_.pieces[piece].limit - tile * C::kKeys - cluster_rank() * C::kKeys / 2 +
                   (storage_.pieces[piece].row_tile * C::kRows + row_tile_ * kRowTile + row_ + 8 * r) / params_.h_q;
      }
      if (limit[0] < C::kKeys / 2 || limit[1] < C::kKeys / 2) {
        mask_scores(scores, limit, lane_);
      }
    }
  }

  // References are whole numbers: going over to another one is exact, also for probabilities that have been rounded.
  __device__ __forceinline__ void move_reference(const float (&scores)[16]) {
    float largest[2], next[2];
    row_maximum(scores, largest);
    bool outgrown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scaled = largest[r] * params_.scale_log2;
      maximum_[r] = fmaxf(maximum_[r], scaled);
      const bool grows = scaled > reference_[r] + kSlack;
      next[r] = grows ? ceilf(scaled) : reference_[r];
      outgrown |= grows;
    }
    if (__any_sync(~0u, outgrown)) {
      this->rescale(next);
    }
  }

  __device__ __forceinline__ void send_probabilities(const uint32_t (&own)[8], bool last) {
    const Message& message = storage_.messages[row_tile_][messages_.stage];
    const uint32_t barrier = peer_address(shared_address(&storage_.message_full[row_tile_][messages_.stage])),
                   destination = peer_address(shared_address(&message.probabilities[0][thread_]));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      store_peer(destination + i * sizeof(message.probabilities[0]), own[4 * i], own[4 * i + 1], own[4 * i + 2],
                 own[4 * i + 3], barrier);
    }
    const uint32_t quad = thread_ / 4;
    if (lane_ % 4 == 0) {
      store_peer(peer_address(shared_address(&message.references[quad])), reference_[0], reference_[1], barrier);
    }
    if (last) {
      sum_[0] = quad_sum(sum_[0]);
      sum_[1] = quad_sum(sum_[1]);
      if (lane_ % 4 == 0) {
        store_peer(peer_address(shared_address(&message.sums[quad])), sum_[0], sum_[1], barrier);
        store_peer(peer_address(shared_address(&message.maxima[quad])), maximum_[0], maximum_[1], barrier);
      }
    }
  }

  // output += probabilities x values of the oldest tile, of which this CTA has its own half of the probabilities.
  __device__ __forceinline__ void multiply(const uint32_t (&own)[8], bool last) {
    uint64_t& full = storage_.message_full[row_tile_][messages_.stage];
    expect(full, sizeof(Message) - (last ? 0 : sizeof(Message::sums) + sizeof(Message::maxima)));
    mbarrier_wait(shared_address(&full), messages_.parity);
    const Message& message = storage_.messages[row_tile_][messages_.stage];
    uint32_t probabilities[16];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = message.probabilities[i][thread_];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        probabilities[4 * i + j] = own[4 * i + j];
      }
      probabilities[8 + 4 * i] = words.x;
      probabilities[9 + 4 * i] = words.y;
      probabilities[10 + 4 * i] = words.z;
      probabilities[11 + 4 * i] = words.w;
    }
    const float2 reference = message.references[thread_ / 4];
    float2 sums{0, 0};
    if (last) {
      sums = message.sums[thread_ / 4];
      const float2 maxima = message.maxima[thread_ / 4];
      maximum_[0] = fmaxf(maximum_[0], maxima.x);
      maximum_[1] = fmaxf(maximum_[1], maxima.y);
    }
    messages_.advance();
    if (__any_sync(~0u, reference.x != reference_[0] || reference.y != reference_[1])) {
      join_references(probabilities, reference, sums);
    }
    sum_[0] += sums.x;
    sum_[1] += sums.y;
    wgmma_fence();
    this->template multiply_registers<0>(keys_.stage, probabilities);
    wgmma_wait<0>();
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[keys_.stage]));
    }
    keys_.advance();
  }

  // The two CTAs' references have grown apart in this tile: both go on from the larger one.
  __device__ __forceinline__ void join_references(uint32_t (&probabilities)[16], const float2& others, float2& sums) {
    const float other[2] = {others.x, others.y},
                next[2] = {fmaxf(reference_[0], other[0]), fmaxf(reference_[1], other[1])};
    const float own_factor[2] = {exp2_approx(reference_[0] - next[0]), exp2_approx(reference_[1] - next[1])},
                other_factor[2] = {exp2_approx(other[0] - next[0]), exp2_approx(other[1] - next[1])};
    this->rescale(next);
    sums.x *= other_factor[0];
    sums.y *= other_factor[1];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int r = i % 2;
      const float factor = i < 8 ? own_factor[r] : other_factor[r];
      const float2 pair = unpack2<T>(probabilities[i]);
      probabilities[i] = pack2<T>(pair.x * factor, pair.y * factor);
    }
  }

  // The bytes may already have come: the phase lasts until they are expected.
  __device__ __forceinline__ void expect(uint64_t& barrier, int bytes) const {
    if (thread_ == 0) {
      mbarrier_arrive_expect_bytes(shared_address(&barrier), bytes);
    }
  }

  __device__ __forceinline__ void finish_piece(int piece) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    PieceFacts facts = storage_.pieces[piece];
    facts.row_tile = facts.row_tile * 2 + row_tile_;
    const int side = cluster_rank();
    if (facts.partial >= 0) {
      sparse_attention::write_partial(params_, facts, side, side == 0, row, lane_, output_, reference_, sum_);
    } else {
      if (params_.max_logits != nullptr && side == 0) {
        sparse_attention::write_maximum(params_, facts, row, lane_, maximum_);
      }
      sparse_attention::write_final(params_, facts, side, side == 0, row, lane_, output_, reference_, sum_, maximum_);
    }
  }

  const SparseAttentionParams& params_;
  const int row_tile_;
  Ring<C::kStages> keys_;
  Ring<2> messages_;
  uint32_t scores_parity_ = 0;
};

}  // namespace flash_mla::sm90::sparse_attention_paired
