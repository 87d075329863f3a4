// The two math warpgroups: the seesaw over the pieces of a part.
#pragma once

#include "sm90/dense_decode/epilogue.cuh"
#include "sm90/dense_decode/producer.cuh"
#include "sm90/grouped_seesaw.cuh"

namespace flash_mla::sm90::dense_decode {

template <class C>
class MathWarpgroup : GroupedSeesaw<MathWarpgroup<C>, C, Storage<C>> {
  using Base = GroupedSeesaw<MathWarpgroup<C>, C, Storage<C>>;
  friend Base;
  using Base::lane_, Base::output_, Base::phases_, Base::reference_, Base::row_, Base::side_, Base::storage_;
  using typename Base::T;

 public:
  __device__ __forceinline__ MathWarpgroup(const DenseDecodeParams& params, Storage<C>& storage, const Place& place,
                                           int side)
      : Base(storage, side, params.scale_log2), params_(params), place_(place) {}

  __device__ __forceinline__ void run() {
    Pieces<false> pieces(params_, place_.part, place_.causal_cut);
    int piece_parity = 0;
    uint32_t q_parity = 0;
    for (Piece piece; pieces.next(piece); piece_parity ^= 1) {
      this->begin_rows();
      unmasked_tiles_ = least_limit(piece) / C::kKeys - piece.begin_tile;
      if (piece.num_tiles > 0) {
        mbarrier_wait(shared_address(&storage_.q_full), q_parity);
        q_parity ^= 1;
        this->run_steps(piece.num_tiles, piece);
      }
      finish_piece(piece, piece_parity);
    }
  }

 private:
  static constexpr bool kCopiedKeys = false;

  struct Nothing {};
  __device__ __forceinline__ Nothing load_mask() const { return {}; }

  __device__ __forceinline__ void mask(float (&scores)[32], const Piece& piece, int tile, Nothing) const {
    if (tile >= unmasked_tiles_) {
      int limit[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        limit[r] = row_limit(piece, row_ + 8 * r) - (piece.begin_tile + tile) * C::kKeys;
      }
      mask_scores(scores, limit, lane_);
    }
  }

  // How many keys a row of the tile sees.
  __device__ __forceinline__ int row_limit(const Piece& piece, int row) const {
    const int token = (place_.row_tile * C::kRows + row) / params_.group;
    return params_.causal ? piece.seqlen - (params_.s_q - 1 - token) : piece.seqlen;
  }

  // What every row of the tile sees: only the last tiles of a request need a mask.
  __device__ __forceinline__ int least_limit(const Piece& piece) const { return max(row_limit(piece, 0), 0); }

  __device__ __forceinline__ void finish_piece(const Piece& piece, int piece_parity) {
    float total[2];
    this->join_sums(piece_parity, total);
    int row = row_;
    asm volatile("" : "+r"(row));  // keeps the epilogue's addresses out of the loop over pieces
    if (piece.partial >= 0) {
      write_partial(params_, place_, piece, side_, row, lane_, output_, reference_, total);
    } else {
      write_final<T>(params_, place_, piece, side_, row, lane_, output_, reference_, total);
    }
  }

  const DenseDecodeParams& params_;
  const Place place_;
  int unmasked_tiles_ = 0;  // of the piece
};

}  // namespace flash_mla::sm90::dense_decode
