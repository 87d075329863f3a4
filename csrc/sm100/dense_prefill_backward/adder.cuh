// The warps that add an item's share of the gradient of Q to the float32 sums in global memory.
#pragma once

#include "device/barrier.cuh"
#include "device/copy.cuh"
#include "device/turns.cuh"
#include "sm100/dense_prefill_backward/storage.h"

namespace flash_mla::sm100::dense_prefill_backward {

// From tensor memory by way of shared memory, 32 columns at a time, in the layouts of CUTLASS's backward, whose own
// reduction knows neither where a sequence ends nor turns.
template <class C>
__device__ __forceinline__ void add(const DensePrefillBackwardParams& params, const TensorMaps& maps,
                                    const BackwardItem& item, typename C::Cutlass::TensorStorage& tensors,
                                    typename C::Cutlass::PipelineMmaReduceDQ& pipeline) {
  using namespace cute;
  using Kernel = typename C::Cutlass;
  using TiledMma = typename Kernel::TiledMmaDSK;
  using Tile = decltype(take<0, 2>(typename Kernel::TileShapeDSK{}));
  constexpr int kThreads = 32 * Kernel::kNumReduceWarps, kStages = Kernel::kStagesReduceTmaStore;
  static_assert(kStages == 2 && size<1>(typename Kernel::SmemLayoutDQ{}) == 32);
  const DensePrefillParams& forward = params.forward;
  const int thread = threadIdx.x % kThreads;

  Tensor tDQ = partition_fragment_C(TiledMma{}, Tile{})(make_coord(_, _), _0{}, _0{});
  tDQ.data() = Kernel::TmemAllocation::kDQ;
  Tensor sDQ = make_tensor(make_smem_ptr(tensors.smem_dq.data()), typename Kernel::SmemLayoutDQ{});
  const auto from_tmem = make_tmem_copy(SM100_TMEM_LOAD_16dp32b16x{}, tDQ).get_slice(thread);
  Tensor source = from_tmem.partition_S(tDQ);
  Tensor destination = from_tmem.partition_D(sDQ);
  Tensor values = make_tensor<float>(shape(from_tmem.partition_D(make_identity_tensor(Tile{}))));
  const auto sync = [] {
    cutlass::arch::NamedBarrier::sync(kThreads, cutlass::arch::ReservedNamedBarriers::TransposeBarrier);
  };

  typename Kernel::PipelineMmaReduceDQ::PipelineState state;
  int stage = 0;
  for_tiles(item, forward.group, [&](int head, int tile) {
    const int token = item.first_query + tile * kBackwardQueryTile, rows = rows_of(item, tile);
    int32_t* turn = nullptr;
    if (params.turns != nullptr) {
      turn = params.turns + static_cast<int64_t>(head) * forward.tokens_q + token;
    }
    pipeline.consumer_wait(state);
    copy(make_tmem_copy(SM100_TMEM_LOAD_16dp32b16x{}, tDQ), source, values);
    cutlass::arch::fence_view_async_tmem_load();
    pipeline.consumer_release(state);
    ++state;
    if (turn != nullptr && thread == 0) {
      wait_for_turn(turn, turn_of(item, tile, forward.causal));
    }
    CUTLASS_PRAGMA_UNROLL
    for (int slice = 0; slice < C::kSumSlices; ++slice) {
      if (thread == 0) {
        bulk_wait_read<kStages - 1>();
      }
      sync();
      copy(values(_, _, slice), destination(_, _, _0{}, stage));
      fence_async_proxy();
      sync();
      if (thread == 0) {
        tma_add(&maps.dq_sum, {0, forward.tokens_q - rows, slice, head, token + rows},
                shared_address(tensors.smem_dq.data() + stage * (kBackwardQueryTile * 32)));
        bulk_commit();
      }
      stage ^= 1;
    }
    if (turn != nullptr && thread == 0) {
      bulk_wait<0>();
      pass_turn_on(turn);
    }
  });
  if (thread == 0) {
    bulk_wait<0>();
  }
}

}  // namespace flash_mla::sm100::dense_prefill_backward
