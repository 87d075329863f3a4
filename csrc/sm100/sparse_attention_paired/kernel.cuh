// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include <type_traits>

#include "sm100/sparse_attention_paired/math.cuh"
#include "sm100/sparse_attention_paired/producer.cuh"
#include "sm100/sparse_attention_paired/products.cuh"
#include "sm100/sparse_attention_paired/row_producer.cuh"

namespace flash_mla::sm100::sparse_attention_paired {

constexpr int kProductWarp = 4;  // the first of its warpgroup; the other three do nothing

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  for (int slot = 0; slot < 2; ++slot) {
    // What is stored is handed over by warps, what is copied by threads.
    mbarrier_init(shared_address(&storage.keys_full[slot]),
                  C::kProducerWarps + (C::kCopiesRows || C::kHasRope ? C::kProducerThreads : 0));
    mbarrier_init(
        shared_address(&storage.values_full[slot]),
        C::kCopiesRows ? C::kProducerThreads : C::kProducerWarps + (C::kRopeInValues ? C::kProducerThreads : 0));
    mbarrier_init(shared_address(&storage.scores_full[slot]), 1);
    mbarrier_init(shared_address(&storage.values_empty[slot]), 1);
    mbarrier_init(shared_address(&storage.probabilities_full[slot]), 2 * C::kMathWarps);
    mbarrier_init(shared_address(&storage.peer_keys_full[slot]), 1);
    mbarrier_init(shared_address(&storage.peer_values_full[slot]), 1);
  }
  for (uint64_t& barrier : storage.valid_full) {
    mbarrier_init(shared_address(&barrier), C::kProducerWarps);
  }
  mbarrier_init(shared_address(&storage.q_full), C::kProducerThreads);
  mbarrier_init(shared_address(&storage.q_empty), 1 + C::kMathWarps);
  fence_mbarrier_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    sparse_attention_paired_kernel(const __grid_constant__ SparseAttentionParams params) {
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barriers(storage);
  }
  if (warp == kProductWarp) {
    tmem_allocate<2>(shared_address(&storage.tensor_memory), kTmemColumns);
    tmem_relinquish<2>();
  }
  tcgen05_fence_before();
  cluster_sync();
  tcgen05_fence_after();
  // Nothing that this kernel reads may still be written by the kernels before it in the stream, the schedule included.
  wait_for_dependencies();
  // Not before the wait: the combine kernel reads the schedule as soon as it starts.
  launch_dependents();

  if (warp >= C::kMathWarps + C::kProductThreads / 32) {
    keep_registers<C::kProducerRegisters>();
    using Producer = std::conditional_t<C::kCopiesRows, RowProducerWarp<C>, ProducerWarp<C>>;
    Producer(params, storage, warp % C::kProducerWarps, lane).run();
  } else if (warp >= C::kMathWarps) {
    keep_registers<C::kProductRegisters>();
    if (warp == kProductWarp) {
      ProductWarp<C>(storage).run();
    }
  } else {
    take_registers<C::kMathRegisters>();
    MathWarp<C>(params, storage, warp, lane).run();
  }
  // Nobody's memory goes while the other CTA has work with it.
  __syncwarp();
  tcgen05_fence_before();
  cluster_sync();
  if (warp == kProductWarp) {
    tcgen05_fence_after();
    tmem_free<2>(storage.tensor_memory, kTmemColumns);
  }
}

}  // namespace flash_mla::sm100::sparse_attention_paired
