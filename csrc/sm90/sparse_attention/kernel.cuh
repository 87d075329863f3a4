// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/sparse_attention/converter.cuh"
#include "sm90/sparse_attention/math.cuh"
#include "sm90/sparse_attention/row_sender.cuh"

namespace flash_mla::sm90::sparse_attention {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kWarpsOfAWarpgroup = 4;
  for (int place = 0; place < C::kPlaces; ++place) {
    mbarrier_init(shared_address(&storage.k_full[place]), C::kProducerWarps);
    mbarrier_init(shared_address(&storage.k_empty[place]), kWarpsOfAWarpgroup);
  }
  for (int sender = 0; sender < C::kSenders; ++sender) {
    constexpr int kConvertingWarps = C::kProducerWarps / C::kSenders;
    mbarrier_init(shared_address(&storage.told[0][sender]), 1);
    mbarrier_init(shared_address(&storage.told[1][sender]), 1);
    mbarrier_init(shared_address(&storage.left_full[sender]), 32 + 1);
    mbarrier_init(shared_address(&storage.left_empty[sender]), kConvertingWarps);
    mbarrier_init(shared_address(&storage.right_full[sender]), 32);
    mbarrier_init(shared_address(&storage.right_empty[sender]), kConvertingWarps);
  }
  mbarrier_init(shared_address(&storage.tail_empty), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.q_full), C::kProducerThreads);
  mbarrier_init(shared_address(&storage.q_empty), 2 * kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.probabilities_full), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.row_sums_full), 2 * kWarpsOfAWarpgroup);
  fence_mbarrier_init();
}

template <class C>
__device__ __forceinline__ void begin_math(const SparseAttentionParams& params) {
  if (params.cut_evenly) {
    prefetch_inputs<C>(params);
  }
  wait_for_dependencies();
  // Not before the wait: the combine kernel reads schedule and lengths as soon as it starts.
  launch_dependents();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sparse_attention_kernel(const __grid_constant__ SparseAttentionParams params) {
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
  constexpr int kWarpgroups = C::kThreads / 128;
  if (warpgroup == kWarpgroups - 1) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kSenderRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    RowSender<C>(params, storage, warp, lane).run();
  } else if (warpgroup >= 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % C::kProducerWarps, 0), lane = threadIdx.x % 32;
    ConvertingWarp<C>(params, storage, warp, lane).run();
  } else if (warpgroup == 0) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kScoringRegisters));
    begin_math<C>(params);
    MathWarpgroup<C>(params, storage, 0).run();
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMultiplyingRegisters));
    begin_math<C>(params);
    MathWarpgroup<C>(params, storage, 1).run();
  }
#endif
}

}  // namespace flash_mla::sm90::sparse_attention
