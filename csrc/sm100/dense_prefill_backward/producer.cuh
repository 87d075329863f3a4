// What brings an item's data: a warp for tiles, by TMA, and one for row terms.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/numeric.cuh"
#include "sm100/dense_prefill_backward/storage.h"

namespace flash_mla::sm100::dense_prefill_backward {

// Behind the last row of a sequence come zeros (tensor_maps.h): what is computed of those rows is 0 or not stored, but
// 0 times a neighbour's NaN would be NaN.
template <class C>
__device__ __forceinline__ void load(const DensePrefillParams& params, const TensorMaps& maps, const BackwardItem& item,
                                     typename C::Cutlass::TensorStorage& tensors,
                                     typename C::Cutlass::PipelineLoadMmaQ& q_pipeline,
                                     typename C::Cutlass::PipelineLoadMmaDO& d_out_pipeline) {
  using Kernel = typename C::Cutlass;
  constexpr int kQValues = cute::cosize_v<typename Kernel::SmemLayoutQ> / 2;  // of a stage
  auto q_state = cutlass::make_producer_start_state<typename Kernel::PipelineLoadMmaQ>();
  auto d_out_state = cutlass::make_producer_start_state<typename Kernel::PipelineLoadMmaDO>();
  const bool elected = cute::elect_one_sync();
  const auto load_rows = [&](const void* destination, const CUtensorMap& map, int tokens, int first, int rows, int head,
                             const uint64_t* barrier) {
    if (elected) {
      tma_load(shared_address(destination), &map, {0, tokens - rows, 0, head, first + rows}, shared_address(barrier));
    }
  };
  bool first = true;
  for_tiles(item, params.group, [&](int head, int tile) {
    const int token = item.first_query + tile * kBackwardQueryTile, rows = rows_of(item, tile);
    q_pipeline.producer_acquire(q_state);
    const uint64_t* barrier = q_pipeline.producer_get_barrier(q_state);
    if (first) {
      q_pipeline.producer_expect_transaction(q_state, Kernel::kTransactionsBytesLoadK);
      load_rows(tensors.smem_k.data(), maps.k, params.tokens_kv, item.first_key, item.num_keys, item.kv_head, barrier);
    }
    load_rows(tensors.smem_q.data() + q_state.index() * kQValues, maps.q, params.tokens_q, token, rows, head, barrier);
    ++q_state;

    d_out_pipeline.producer_acquire(d_out_state);
    barrier = d_out_pipeline.producer_get_barrier(d_out_state);
    if (first) {
      d_out_pipeline.producer_expect_transaction(d_out_state, Kernel::kTransactionsBytesLoadV);
      load_rows(tensors.smem_v.data(), maps.v, params.tokens_kv, item.first_key, item.num_keys, item.kv_head, barrier);
    }
    load_rows(tensors.smem_do.data(), maps.d_out, params.tokens_q, token, rows, head, barrier);
    ++d_out_state;
    first = false;
  });
}

// CUTLASS wants both terms negated, and the first one in powers of 2. The values of a tile are on their way while the
// one before it still has their place.
template <class C>
__device__ __forceinline__ void load_row_terms(const DensePrefillBackwardParams& params, const BackwardItem& item,
                                               int lane, typename C::Cutlass::TensorStorage& tensors,
                                               typename C::Cutlass::PipelineLoadComputeLSE& lse_pipeline,
                                               typename C::Cutlass::PipelineLoadComputeSumOdO& delta_pipeline) {
  constexpr int kRows = kBackwardQueryTile / 32;  // of a lane
  const DensePrefillParams& forward = params.forward;
  auto lse_state = cutlass::make_producer_start_state<typename C::Cutlass::PipelineLoadComputeLSE>();
  auto delta_state = cutlass::make_producer_start_state<typename C::Cutlass::PipelineLoadComputeSumOdO>();
  for_tiles(item, forward.group, [&](int head, int tile) {
    const int64_t first =
        static_cast<int64_t>(head) * forward.tokens_q + item.first_query + tile * kBackwardQueryTile + lane;
    float lse[kRows], delta[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      // Rows that there are not have probabilities of 0.
      const bool exists = lane + 32 * i < rows_of(item, tile);
      lse[i] = exists ? -kLog2E * forward.lse[first + 32 * i] : -INFINITY;
      delta[i] = exists ? -params.deltas[first + 32 * i] : 0;
    }
    lse_pipeline.producer_acquire(lse_state);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      tensors.smem_lse[lane + 32 * i] = lse[i];
    }
    lse_pipeline.producer_commit(lse_state);
    ++lse_state;
    delta_pipeline.producer_acquire(delta_state);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      tensors.smem_sum_odo[lane + 32 * i] = delta[i];
    }
    delta_pipeline.producer_commit(delta_state);
    ++delta_state;
  });
}

}  // namespace flash_mla::sm100::dense_prefill_backward
