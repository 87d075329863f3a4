// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "device/few_rows/producer.cuh"
#include "sm100/sparse_attention_few_heads/math.cuh"
#include "sm100/sparse_attention_few_heads/products.cuh"

namespace flash_mla::sm100::sparse_attention_few_heads {

template <class C>
constexpr int kProductWarp = C::kMathWarps;  // the first of its warpgroup; the other three do nothing

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  for (int slot = 0; slot < 2; ++slot) {
    mbarrier_init(shared_address(&storage.k_full[slot]), kKeysFullArrivals<C>);
    mbarrier_init(shared_address(&storage.k_empty[slot]), 1);
    mbarrier_init(shared_address(&storage.scores_full[slot]), 1);
    mbarrier_init(shared_address(&storage.probabilities_full[slot]), C::kMathWarps);
  }
  mbarrier_init(shared_address(&storage.q_full), C::kProducerThreads);
  mbarrier_init(shared_address(&storage.q_empty), 1 + C::kMathWarps);
  fence_mbarrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sparse_attention_few_heads_kernel(const __grid_constant__ SparseAttentionParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barriers(storage);
  }
  if (warp == kProductWarp<C>) {
    tmem_allocate(shared_address(&storage.tensor_memory), C::kTensorColumns);
    tmem_relinquish();
    tcgen05_fence_before();
  }
  __syncthreads();
  tcgen05_fence_after();
  // Nothing that this kernel reads may still be written by the kernels before it in the stream, the schedule included.
  wait_for_dependencies();
  // Not before the wait: the combine kernel reads the schedule as soon as it starts.
  launch_dependents();

  if (warp >= kProductWarp<C> + C::kProductThreads / 32) {
    keep_registers<C::kProducerRegisters>();
    FewRowsProducerWarp<C, Storage<C>>(params, storage, warp - kProductWarp<C> - C::kProductThreads / 32, lane).run();
  } else if (warp >= kProductWarp<C>) {
    keep_registers<C::kProductRegisters>();
    if (warp == kProductWarp<C>) {
      ProductWarp<C>(storage).run();
    }
  } else {
    take_registers<C::kMathRegisters>();
    MathWarp<C>(params, storage, warp, lane).run();
    tcgen05_fence_before();
  }
  __syncthreads();
  if (warp == kProductWarp<C>) {
    tcgen05_fence_after();
    tmem_free(storage.tensor_memory, C::kTensorColumns);
  }
}

}  // namespace flash_mla::sm100::sparse_attention_few_heads
