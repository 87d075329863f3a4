// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/sparse_attention_few_heads/math.cuh"
#include "sm90/sparse_attention_few_heads/producer.cuh"

namespace flash_mla::sm90::sparse_attention_few_heads {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  for (int slot = 0; slot < 2; ++slot) {
    mbarrier_init(shared_address(&storage.k_full[slot]), kKeysFullArrivals<C>);
    mbarrier_init(shared_address(&storage.k_empty[slot]), C::kMathWarps);
  }
  if constexpr (C::kIndexWarps > 0) {
    for (int stage = 0; stage < C::Feed::kStages; ++stage) {
      mbarrier_init(shared_address(&storage.walks.full[stage]), C::kIndexWarps);
      mbarrier_init(shared_address(&storage.walks.empty[stage]), C::kProducerWarps + C::kQueryWarps);
    }
  }
  mbarrier_init(shared_address(&storage.q_full), C::kQueryThreads);
  mbarrier_init(shared_address(&storage.q_empty), C::kMathWarps);
  fence_mbarrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sparse_attention_few_heads_kernel(const __grid_constant__ SparseAttentionParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    init_barriers(storage);
  }
  __syncthreads();
  // Nothing that this kernel reads may still be written by the kernels before it in the stream, the schedule included:
  // each role waits for them.
  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (C::kIndexWarps > 0 && warpgroup * 128 >= C::kMathThreads + 32 * C::kConvertingWarps) {
    if constexpr (C::kIndexWarps > 0) {
      asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kIndexRegisters));
      const int warp = __shfl_sync(~0u, threadIdx.x / 32 - C::kMathWarps - C::kConvertingWarps, 0),
                lane = threadIdx.x % 32;
      if (warp < C::kIndexWarps) {
        IndexWarp<C>(params, storage, warp, lane).run();
      } else {
        QueryWarp<C>(params, storage, warp - C::kIndexWarps, lane).run();
      }
    }
  } else if (warpgroup > 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 - C::kMathWarps, 0), lane = threadIdx.x % 32;
    ProducerWarp<C>(params, storage, warp, lane).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    if (params.cut_evenly) {
      prefetch_inputs<C>(params);
    }
    wait_for_dependencies();
    // Not before the wait: the combine kernel reads schedule and lengths as soon as it starts.
    launch_dependents();
    MathWarpgroup<C>(params, storage).run();
  }
#endif
}

}  // namespace flash_mla::sm90::sparse_attention_few_heads
