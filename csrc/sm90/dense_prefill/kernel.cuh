// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/dense_prefill/math.cuh"
#include "sm90/dense_prefill/producer.cuh"

namespace flash_mla::sm90::dense_prefill {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kMathWarps = 4 * C::kWarpgroups;
  for (int slot = 0; slot < 2; ++slot) {
    mbarrier_init(shared_address(&storage.item_full[slot]), 1);
    mbarrier_init(shared_address(&storage.item_empty[slot]), kMathWarps + 2);  // with the TMA thread and the cleaner
  }
  mbarrier_init(shared_address(&storage.item_wanted), 1);
  for (int w = 0; w < C::kWarpgroups; ++w) {
    mbarrier_init(shared_address(&storage.q_full[w]), 1);
    mbarrier_init(shared_address(&storage.q_empty[w]), 4);
  }
  for (int stage = 0; stage < C::kStages; ++stage) {
    mbarrier_init(shared_address(&storage.k_full[stage]), 1);
    mbarrier_init(shared_address(&storage.k_empty[stage]), kMathWarps);
    mbarrier_init(shared_address(&storage.v_full[stage]), 1);
    mbarrier_init(shared_address(&storage.v_empty[stage]), kMathWarps);
    mbarrier_init(shared_address(&storage.v_landed[stage]), 1);
  }
  fence_mbarrier_init();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(Config<T, kHeadDim>::kThreads, 1)
    dense_prefill_kernel(const __grid_constant__ DensePrefillParams params, const __grid_constant__ TensorMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&maps.q);
    tma_prefetch_descriptor(&maps.k);
    tma_prefetch_descriptor(&maps.v);
    init_barriers(storage);
  }
  // Nothing that this kernel reads may still be written by the kernels before it in the stream, the plan included.
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
      Scheduler<C>(params, storage, lane).run();
    } else if (warp == kCleanerWarp) {
      Cleaner<C>::run(storage, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    MathWarpgroup<C>(params, storage, warpgroup).run();
  }
#endif
}

}  // namespace flash_mla::sm90::dense_prefill
