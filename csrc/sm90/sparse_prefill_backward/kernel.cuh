// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/sparse_prefill_backward/math.cuh"
#include "sm90/sparse_prefill_backward/producer.cuh"

namespace flash_mla::sm90::sparse_prefill_backward {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kMathWarps = 4 * C::kWarpgroups;
  mbarrier_init(shared_address(&storage.q_full), 1);
  mbarrier_init(shared_address(&storage.q_empty), kMathWarps);
  for (int group = 0; group < C::kWarpgroups; ++group) {
    // The threads' copies; with the first group also slots and valid bits.
    mbarrier_init(shared_address(&storage.k_full[group]),
                  32 * C::kProducerWarps + (group == 0 ? C::kProducerWarps : 0));
    mbarrier_init(shared_address(&storage.k_empty[group]), 4);
  }
  mbarrier_init(shared_address(&storage.probabilities_empty), kMathWarps);
  fence_mbarrier_init();
}

template <int kHeadDim, bool kFixed>
__global__ void __launch_bounds__(Config<kHeadDim, kFixed>::kThreads, 1)
    sparse_prefill_backward_kernel(const __grid_constant__ SparsePrefillBackwardParams params,
                                   const __grid_constant__ TensorMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<kHeadDim, kFixed>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&maps.q);
    tma_prefetch_descriptor(&maps.d_out);
    init_barriers(storage);
  }
  // Nothing that this kernel reads may still be written by the kernels before it in the stream.
  wait_for_dependencies();
  launch_dependents();
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == C::kWarpgroups) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0);
    ProducerWarp<C>(params, maps, storage, warp, threadIdx.x % 32).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    if (warpgroup == 0) {
      MathWarpgroup<C, 0>(params, storage).run();
    } else {
      MathWarpgroup<C, 1>(params, storage).run();
    }
  }
#endif
}

}  // namespace flash_mla::sm90::sparse_prefill_backward
