// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/sparse_attention_bf16/math.cuh"

namespace flash_mla::sm90::sparse_attention_bf16 {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kWarpsOfAWarpgroup = 4;
  for (int slot = 0; slot < 2; ++slot) {
    mbarrier_init(shared_address(&storage.k_full[slot]), C::kProducerThreads + C::kProducerWarps);
    for (int group = 0; group < kNumGroups; ++group) {
      mbarrier_init(shared_address(&storage.k_empty[slot][group]), kWarpsOfAWarpgroup);
    }
  }
  mbarrier_init(shared_address(&storage.q_full), C::kProducerThreads);
  mbarrier_init(shared_address(&storage.q_empty), 2 * kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.probabilities_full[0]), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.probabilities_full[1]), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.second_half_full), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.row_sums_full), 2 * kWarpsOfAWarpgroup);
  fence_mbarrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sparse_attention_bf16_kernel(const __grid_constant__ SparseAttentionParams params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    init_barriers(storage);
  }
  __syncthreads();
  // Nothing that this kernel reads may still be written by the kernels before it in the stream, the schedule included.
  wait_for_dependencies();
  // Not before the wait: the combine kernel reads the schedule as soon as it starts.
  launch_dependents();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    ProducerWarp<C>(params, storage, warp, lane).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    MathWarpgroup<C>(params, storage, warpgroup).run();
  }
#endif
}

}  // namespace flash_mla::sm90::sparse_attention_bf16
