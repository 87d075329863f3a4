// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/dense_prefill_backward/math.cuh"
#include "sm90/dense_prefill_backward/producer.cuh"

namespace flash_mla::sm90::dense_prefill_backward {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kMathWarps = 4 * C::kWarpgroups;
  for (int slot = 0; slot < 2; ++slot) {
    mbarrier_init(shared_address(&storage.item_full[slot]), 1);
    mbarrier_init(shared_address(&storage.item_empty[slot]), kMathWarps + 3);  // with TMA, row warp and adder
  }
  mbarrier_init(shared_address(&storage.item_wanted), 1);
  mbarrier_init(shared_address(&storage.keys_full), 1);
  mbarrier_init(shared_address(&storage.keys_landed), 1);
  mbarrier_init(shared_address(&storage.keys_empty), kMathWarps);
  for (int stage = 0; stage < C::kStages; ++stage) {
    mbarrier_init(shared_address(&storage.rows_full[stage]), 1 + 32);  // TMA, the lanes of the row warp
    mbarrier_init(shared_address(&storage.rows_landed[stage]), 1);
    mbarrier_init(shared_address(&storage.rows_empty[stage]), kMathWarps);
  }
  mbarrier_init(shared_address(&storage.ds_empty), kMathWarps);
  for (int w = 0; w < C::kWarpgroups; ++w) {
    mbarrier_init(shared_address(&storage.dq_full[w]), 4);
    mbarrier_init(shared_address(&storage.dq_empty[w]), 1);
  }
  fence_mbarrier_init();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(Config<T, kHeadDim>::kThreads, 1)
    dense_prefill_backward_kernel(const __grid_constant__ DensePrefillBackwardParams params,
                                  const __grid_constant__ TensorMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    for (const CUtensorMap* map : {&maps.q, &maps.k, &maps.v, &maps.d_out, &maps.dq_sum}) {
      tma_prefetch_descriptor(map);
    }
    init_barriers(storage);
  }
  // Nothing that this kernel reads may still be written by the kernels before it in the stream.
  wait_for_dependencies();
  launch_dependents();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == C::kWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    if (warp == kTmaWarp) {
      if (elect_one()) {
        TmaThread<C>(params, maps, storage).run();
      }
    } else if (warp == kSchedulerWarp) {
      if (elect_one()) {
        schedule<C>(params, storage);
      }
    } else if (warp == kRowWarp) {
      RowWarp<C>(params, storage, lane).run();
    } else if (elect_one()) {
      Adder<C>::run(params, maps, storage);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    MathWarpgroup<C>(params, storage, warpgroup).run();
  }
#endif
}

}  // namespace flash_mla::sm90::dense_prefill_backward
