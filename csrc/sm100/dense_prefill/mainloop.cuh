// CUTLASS's mainloops with a load of our own, under which the values behind a sequence's end are zeros.
//
// CUTLASS reads whole tiles of keys: behind a sequence's end they hold the next sequence's rows. Its scores are masked,
// but a probability of 0 times a value that is NaN or infinite is NaN. So the values' tensor map has the token
// dimension twice: one counts from the front of the sequence and ends where all sequences end, the other is the
// sequence's place, both with the stride of a token.
//
// The scheduler calls for no tile of a sequence without keys, so CUTLASS's code for it (which prints, and writes -inf
// as lse) gives way to none.
#pragma once

#include <cute/tensor.hpp>

#include <collective/sm100_fmha_fwd_mainloop_tma_warpspecialized.hpp>
#include <collective/sm100_fmha_mla_fwd_mainloop_tma_warpspecialized.hpp>

namespace flash_mla::sm100::dense_prefill {

template <class Base>
struct Mainloop : Base {
  using typename Base::PipelineKV;
  using typename Base::PipelineQ;
  using MmaQK = typename Base::CollectiveMmaQK;
  using MmaPV = typename Base::CollectiveMmaPV;
  using TileQK = typename Base::TileShapeQK;
  using TilePV = typename Base::TileShapePV;

  // With 192 columns a key and a value tile differ in size and have stages of their own, in turns.
  static constexpr bool kSeparateStages = Base::TransactionBytesLoadK != Base::TransactionBytesLoadV;

  template <class Block, class Shape, class WholeShape>
  __device__ __forceinline__ void load(const Block& block, const Shape& shape, const typename Base::Params& params,
                                       const WholeShape& whole, typename Base::TensorStorage& storage,
                                       PipelineQ& pipeline_q, typename PipelineQ::PipelineState& q_state,
                                       PipelineKV& pipeline_kv, typename PipelineKV::PipelineState& kv_state) {
    using namespace cute;
    using X = Underscore;
    const auto& [tma_q, tma_k, tma_v] = params.load;
    const int sequence = get<2, 1>(block);
    const int q_begin = get<0>(whole).cumulative_length[sequence], k_begin = get<1>(whole).cumulative_length[sequence];
    const int num_keys = get<1>(shape), tokens_kv = get<1>(whole).total_length;
    const auto head = make_coord(get<2, 0>(block), 0);
    const auto value_head = make_coord(get<2, 0>(block), k_begin + num_keys);
    const auto heads = get<3>(whole);
    const Int<size<2>(TileQK{})> head_dim{};

    const auto mma_qk = typename MmaQK::TiledMma{}.get_slice(0);
    const auto mma_pv = typename MmaPV::TiledMma{}.get_slice(0);
    const auto at = [](int token) { return make_coord(token, _0{}, make_coord(_0{}, _0{})); };
    Tensor mQ = domain_offset(at(q_begin), tma_q.get_tma_tensor(make_shape(int(get<0>(whole)), head_dim, heads)));
    Tensor mK = domain_offset(at(k_begin), tma_k.get_tma_tensor(make_shape(tokens_kv, head_dim, heads)));
    Tensor mV = domain_offset(make_coord(_0{}, tokens_kv - num_keys, make_coord(_0{}, _0{})),
                              tma_v.get_tma_tensor(make_shape(size<1>(TilePV{}), tokens_kv, heads)));
    Tensor tQ = mma_qk.partition_A(local_tile(mQ, TileQK{}, make_coord(_, _, _), Step<_1, X, _1>{}));
    Tensor tK = mma_qk.partition_B(local_tile(mK, TileQK{}, make_coord(_, _, _), Step<X, _1, _1>{}));
    Tensor tV = mma_pv.partition_B(local_tile(mV, TilePV{}, make_coord(_, _, _), Step<X, _1, _1>{}));
    Tensor sQ = make_tensor(make_smem_ptr(storage.smem_q.data()), typename Base::SmemLayoutQ{});
    Tensor sK = make_tensor(make_smem_ptr(storage.smem_k.data()), typename Base::SmemLayoutK{});
    Tensor sV = make_tensor(make_smem_ptr(storage.smem_v.data()), typename Base::SmemLayoutV{});
    const auto partition = [](const auto& tma, const auto& shared, const auto& global) {
      return tma_partition(tma, _0{}, make_layout(_1{}), group_modes<0, 3>(shared), group_modes<0, 3>(global));
    };
    const auto [gQ_all, tQsQ] = partition(tma_q, sQ, tQ);
    const auto [gK_all, tKsK] = partition(tma_k, sK, tK);
    const auto [gV_all, tVsV] = partition(tma_v, sV, tV);
    Tensor gQ = gQ_all(_, _, _0{}, head);
    Tensor gK = gK_all(_, _, _0{}, head);
    Tensor gV = gV_all(_, _0{}, _, value_head);

    const bool elected = elect_one_sync();
    const auto load_q = [&](int tile) {
      pipeline_q.producer_acquire(q_state);
      if (elected) {
        copy(tma_q.with(*pipeline_q.producer_get_barrier(q_state), 0), gQ(_, tile), tQsQ(_, q_state.index()));
      }
      ++q_state;
    };
    const auto stage = [&] { return kSeparateStages ? kv_state.index() / 2 : kv_state.index(); };
    const auto load_k = [&](int tile) {
      pipeline_kv.producer_acquire(kv_state);
      if (elected) {
        copy(tma_k.with(*pipeline_kv.producer_get_barrier(kv_state), 0), gK(_, tile), tKsK(_, stage()));
      }
      ++kv_state;
    };
    const auto load_v = [&](int tile) {
      if constexpr (kSeparateStages) {
        pipeline_kv.producer_acquire_bytes(kv_state, Base::TransactionBytesLoadV);
      } else {
        pipeline_kv.producer_acquire(kv_state);
      }
      if (elected) {
        copy(tma_v.with(*pipeline_kv.producer_get_barrier(kv_state), 0), gV(_, tile), tVsV(_, stage()));
      }
      ++kv_state;
    };

    // The order in which the MMA warp waits for them.
    const int trips = typename Base::Mask{}.get_trip_count(block, typename Base::TileShape{}, shape);
    load_q(2 * get<0>(block));
    load_k(0);
    load_q(2 * get<0>(block) + 1);
    load_v(0);
    CUTLASS_PRAGMA_NO_UNROLL
    for (int tile = 1; tile < trips; ++tile) {
      load_k(tile);
      load_v(tile);
    }
  }

  template <class... Arguments>
  __device__ __forceinline__ void correction_empty(Arguments&&...) {}
};

}  // namespace flash_mla::sm100::dense_prefill
