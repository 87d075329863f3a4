// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/dense_decode/math.cuh"

namespace flash_mla::sm90::dense_decode {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kWarpsOfAWarpgroup = 4;
  for (int slot = 0; slot < 2; ++slot) {
    for (int group = 0; group < kNumGroups; ++group) {
      mbarrier_init(shared_address(&storage.k_full[slot][group]), kFullArrivals);
      mbarrier_init(shared_address(&storage.k_empty[slot][group]), kWarpsOfAWarpgroup);
    }
  }
  mbarrier_init(shared_address(&storage.q_full), kNumRowWarps);
  mbarrier_init(shared_address(&storage.q_empty), 2 * kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.row_warps_turn[0]), 1);
  mbarrier_init(shared_address(&storage.row_warps_turn[1]), 1);
  fence_mbarrier_init();
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(384, 1)
    dense_decode_kernel(const __grid_constant__ DenseDecodeParams params, const __grid_constant__ CUtensorMap map) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    tma_prefetch_descriptor(&map);
    init_barriers(storage);
  }
  __syncthreads();
  wait_for_dependencies();
  launch_dependents();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    if (warp == kTmaWarp) {
      if (params.box_rows > 0 && elect_one()) {
        TmaThread<C>(params, map, storage, Place(params)).run();
      }
    } else if (warp < kFirstRowWarp + kNumRowWarps) {
      RowWarps<C>::run(params, storage, Place(params), warp - kFirstRowWarp, lane);
    }
  } else if (warpgroup == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    MathWarpgroup<C, 0>(params, storage).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    MathWarpgroup<C, 1>(params, storage).run();
  }
#endif
}

}  // namespace flash_mla::sm90::dense_decode
