// The two math warpgroups. Each has one of the pair's row tiles, and of its output the CTA's half of the columns.
// Scores are sums over columns, so each CTA computes a part: the row tile's owner, the CTA with the tile's number,
// receives the other part, and sends the probabilities.
#pragma once

#include "device/cluster.cuh"
#include "device/sparse/epilogue.cuh"
#include "sm90/seesaw.cuh"
#include "sm90/sparse_attention_paired/storage.h"

namespace flash_mla::sm90::sparse_attention_paired {

template <class C>
class MathWarpgroup : SeesawWarpgroup<__nv_bfloat16, Storage<C>> {
  using T = __nv_bfloat16;
  using Base = SeesawWarpgroup<T, Storage<C>>;
  using Base::lane_, Base::output_, Base::reference_, Base::row_, Base::storage_, Base::sum_, Base::thread_;
  using typename Base::Atoms;
  static constexpr int kScoreBytes = sizeof(Storage<C>::scores), kRowBytes = sizeof(Message::rows);

 public:
  __device__ __forceinline__ MathWarpgroup(const SparseAttentionParams& params, Storage<C>& storage, int row_tile)
      : Base(storage, row_tile), params_(params), row_tile_(row_tile) {}

  __device__ __forceinline__ void run() {
    int num_tiles = wait_for_piece(0);
    if (!owns_rows() && num_tiles > 0) {
      score_ahead(num_tiles == 1);
    }
    for (uint32_t piece = 0; num_tiles >= 0; piece ^= 1) {
      this->begin_rows();
      if (num_tiles == 0) {
        this->release_q();
      }
      if (owns_rows()) {
        run_owner(num_tiles, piece);
        finish_piece(storage_.pieces[piece]);
        num_tiles = wait_for_piece(piece ^ 1);
      } else {
        run_other(num_tiles);
        // The owner of the next piece's first tile waits for this part of its scores: it comes before the results. With
        // Q handed back, these facts may be overwritten.
        const PieceFacts facts = storage_.pieces[piece];
        num_tiles = wait_for_piece(piece ^ 1);
        if (num_tiles > 0) {
          score_ahead(num_tiles == 1);
        }
        finish_piece(facts);
      }
    }
  }

 private:
  // No product is in flight at a loop's back edge, where the compiler would have to merge accumulators: it serialises
  // all products then. One warpgroup's products run under the other's exchange and exponentials.

  __device__ __forceinline__ bool owns_rows() const { return row_tile_ == cluster_rank(); }

  __device__ __forceinline__ void run_owner(int num_tiles, int piece) {
#pragma unroll 1
    for (int tile = 0; tile < num_tiles; ++tile) {
      float scores[32];
      uint32_t probabilities[16];
      wait_for_keys(keys_);
      wgmma_fence();
      issue_scores(scores, keys_.stage);
      wgmma_wait<0>();
      add_peer_scores(scores);
      find_probabilities(scores, probabilities, piece, tile, num_tiles, keys_.stage);
      multiply(probabilities);
    }
  }

  __device__ __forceinline__ void find_probabilities(float (&scores)[32], uint32_t (&probabilities)[16], int piece,
                                                     int tile, int num_tiles, int stage) {
    if (tile + 1 == num_tiles) {
      this->release_q();
    }
    mask(scores, piece, tile, stage);
    if (params_.max_logits != nullptr) {
      keep_maximum(scores, tile == 0);
    }
    this->move_reference(scores, params_.scale_log2);
    exponentiate<T, 0, 4>(scores, params_.scale_log2, reference_, sum_, probabilities);
    send_probabilities(probabilities);
  }

  // Tiles of the piece whose Q is there; -1: no piece.
  __device__ __forceinline__ int wait_for_piece(uint32_t piece) const {
    mbarrier_wait(shared_address(&storage_.q_full), piece);
    fence_async_proxy();
    return storage_.pieces[piece].num_tiles;
  }

  // The scores of a tile are sent before the probabilities of the tile before it are waited for; those of the first one
  // have been.
  __device__ __forceinline__ void run_other(int num_tiles) {
#pragma unroll 1
    for (int tile = 1; tile <= num_tiles; ++tile) {
      if (tile < num_tiles) {
        score_ahead(tile + 1 == num_tiles);
      }
      uint32_t probabilities[16];
      receive_probabilities(probabilities);
      multiply(probabilities);
    }
  }

  __device__ __forceinline__ void score_ahead(bool last) {
    float scores[32];
    wait_for_keys(ahead_);
    wgmma_fence();
    issue_scores(scores, ahead_.stage);
    wgmma_wait<0>();
    if (last) {
      this->release_q();
    }
    send_scores(scores);
    ahead_.advance();
  }

  // ---- products
  __device__ __forceinline__ void wait_for_keys(const Ring<C::kStages>& at) const {
    mbarrier_wait(shared_address(&storage_.k_full[at.stage][kValues]), at.parity);
    if constexpr (C::kHasRope) {
      mbarrier_wait(shared_address(&storage_.k_full[at.stage][kRope]), at.parity);
    }
    fence_async_proxy();
  }

  __device__ __forceinline__ void issue_scores(float (&scores)[32], int stage) const {
    const uint32_t q_tile = shared_address(storage_.q[row_tile_]), k_tile = shared_address(storage_.k[stage]);
    const Descriptor q(q_tile, 16), k(k_tile, 16);
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
  }

  __device__ __forceinline__ void multiply(const uint32_t (&probabilities)[16]) {
    wgmma_fence();
    this->template multiply_registers<0>(keys_.stage, probabilities);
    wgmma_wait<0>();
    release(keys_.stage);
    keys_.advance();
  }

  __device__ __forceinline__ void release(int stage) {
    if (lane_ == 0) {
      mbarrier_arrive(shared_address(&storage_.k_empty[stage]));
    }
  }

  // The largest scores so far, for those who ask.
  __device__ __forceinline__ void keep_maximum(const float (&scores)[32], bool first) {
    float largest[2];
    row_maximum(scores, largest);
    if (lane_ % 4 == 0) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float& kept = storage_.row_max[row_ + 8 * r];
        kept = fmaxf(first ? -INFINITY : kept, largest[r] * params_.scale_log2);
      }
    }
  }

  // ---- scores: from the other warpgroup of a row tile to its owner
  __device__ __forceinline__ void send_scores(const float (&scores)[32]) {
    mbarrier_wait(shared_address(&storage_.peer_scores_read), scores_parity_ ^ 1);
    const uint32_t barrier = peer_address(shared_address(&storage_.scores_full)),
                   destination = peer_address(shared_address(&storage_.scores[0][thread_]));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      store_peer(destination + i * sizeof(storage_.scores[0]), __float_as_uint(scores[4 * i]),
                 __float_as_uint(scores[4 * i + 1]), __float_as_uint(scores[4 * i + 2]),
                 __float_as_uint(scores[4 * i + 3]), barrier);
    }
    scores_parity_ ^= 1;
  }

  __device__ __forceinline__ void add_peer_scores(float (&scores)[32]) {
    expect(storage_.scores_full, kScoreBytes);
    mbarrier_wait(shared_address(&storage_.scores_full), scores_parity_);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 part = storage_.scores[i][thread_];
      scores[4 * i] += part.x;
      scores[4 * i + 1] += part.y;
      scores[4 * i + 2] += part.z;
      scores[4 * i + 3] += part.w;
    }
    uint32_t read = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      read |= __float_as_uint(scores[4 * i]);
    }
    tell_peer(storage_.peer_scores_read, read);
    scores_parity_ ^= 1;
  }

  // Keys that do not count become -inf.
  __device__ __forceinline__ void mask(float (&scores)[32], int piece, int tile, int stage) const {
    const uint2 valid = *reinterpret_cast<const uint2*>(storage_.valid[stage]);
    if ((valid.x & valid.y) != ~0u) {
      mask_keys(scores, valid.x, valid.y, lane_);
    }
    if (params_.causal) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = storage_.pieces[piece].limit - tile * C::kKeys +
                   (storage_.pieces[piece].row_tile * C::kRows + row_tile_ * kRowTile + row_ + 8 * r) / params_.h_q;
      }
      if (limit[0] < C::kKeys || limit[1] < C::kKeys) {
        mask_scores(scores, limit, lane_);
      }
    }
  }

  // ---- probabilities, and then sums: from a row tile's owner to the other warpgroup
  __device__ __forceinline__ void send_probabilities(const uint32_t (&probabilities)[16]) {
    const int turn = messages_.stage;
    const Message& message = storage_.messages[turn];
    mbarrier_wait(shared_address(&storage_.peer_message_read[turn]), messages_.parity ^ 1);
    const uint32_t barrier = peer_address(shared_address(&storage_.message_full[turn])),
                   destination = peer_address(shared_address(&message.probabilities[0][thread_]));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      store_peer(destination + i * sizeof(message.probabilities[0]), probabilities[4 * i], probabilities[4 * i + 1],
                 probabilities[4 * i + 2], probabilities[4 * i + 3], barrier);
    }
    send_rows(message, reference_, barrier);
  }

  __device__ __forceinline__ void receive_probabilities(uint32_t (&probabilities)[16]) {
    const Message& message = receive(sizeof(Message));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint4 words = message.probabilities[i][thread_];
      probabilities[4 * i] = words.x;
      probabilities[4 * i + 1] = words.y;
      probabilities[4 * i + 2] = words.z;
      probabilities[4 * i + 3] = words.w;
    }
    const float2 reference = message.rows[thread_ / 4];
    finish_message(probabilities[0] | probabilities[4] | probabilities[8] | probabilities[12] |
                   __float_as_uint(reference.x));
    this->adopt_reference({reference.x, reference.y});
  }

  __device__ __forceinline__ void send_sums(const float (&total)[2]) {
    const int turn = messages_.stage;
    mbarrier_wait(shared_address(&storage_.peer_message_read[turn]), messages_.parity ^ 1);
    send_rows(storage_.messages[turn], total, peer_address(shared_address(&storage_.message_full[turn])));
  }

  __device__ __forceinline__ void receive_sums(float (&total)[2]) {
    const float2 sums = receive(kRowBytes).rows[thread_ / 4];
    finish_message(__float_as_uint(sums.x));
    total[0] = sums.x;
    total[1] = sums.y;
  }

  __device__ __forceinline__ void send_rows(const Message& message, const float (&values)[2], uint32_t barrier) {
    if (lane_ % 4 == 0) {
      store_peer(peer_address(shared_address(&message.rows[thread_ / 4])), values[0], values[1], barrier);
    }
    messages_.advance();
  }

  __device__ __forceinline__ const Message& receive(int bytes) {
    uint64_t& full = storage_.message_full[messages_.stage];
    expect(full, bytes);
    mbarrier_wait(shared_address(&full), messages_.parity);
    return storage_.messages[messages_.stage];
  }

  __device__ __forceinline__ void finish_message(uint32_t read) {
    tell_peer(storage_.peer_message_read[messages_.stage], read);
    messages_.advance();
  }

  // The bytes may already have come: the phase lasts until they are expected.
  __device__ __forceinline__ void expect(uint64_t& barrier, int bytes) const {
    if (thread_ == 0) {
      mbarrier_arrive_expect_bytes(shared_address(&barrier), bytes);
    }
  }

  // The warp has read what the other CTA may now write over. Loads wait where wgmma needs all of shared memory's
  // bandwidth, and neither the arrival in the other CTA nor what it then sends waits behind them. So the arrival is
  // made to depend on `read`, something of each load of each lane: masked with 0, which the compiler does not
  // know.
  __device__ __forceinline__ void tell_peer(uint64_t& barrier, uint32_t read) const {
    const uint32_t all_have_read = __ballot_sync(~0u, read != 0);
    if (lane_ == 0) {
      mbarrier_arrive_peer(peer_address(shared_address(&barrier)) + (all_have_read & params_.h_q >> 31));
    }
  }

  // ---- the end of a piece
  __device__ __forceinline__ void finish_piece(PieceFacts facts) {
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    facts.row_tile = facts.row_tile * 2 + row_tile_;
    float total[2], maximum[2] = {-INFINITY, -INFINITY};
    const bool owner = owns_rows();
    if (owner) {
      total[0] = quad_sum(sum_[0]);
      total[1] = quad_sum(sum_[1]);
      send_sums(total);
      if (params_.max_logits != nullptr && facts.num_tiles > 0) {
        maximum[0] = storage_.row_max[row_];
        maximum[1] = storage_.row_max[row_ + 8];
      }
      if (params_.max_logits != nullptr) {
        write_maximum(params_, facts, row, lane_, maximum);
      }
    } else {
      receive_sums(total);
    }
    if (facts.partial >= 0) {
      write_partial(params_, facts, cluster_rank(), owner, row, lane_, output_, reference_, total);
    } else {
      write_final(params_, facts, cluster_rank(), owner, row, lane_, output_, reference_, total, maximum);
    }
  }

  const SparseAttentionParams& params_;
  const int row_tile_;
  Ring<C::kStages> keys_;   // of the next products
  Ring<C::kStages> ahead_;  // of the next scores, where another CTA owns the rows
  Ring<2> messages_;
  uint32_t scores_parity_ = 0;
};

}  // namespace flash_mla::sm90::sparse_attention_paired
