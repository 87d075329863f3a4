// Set-up, the switch between the warp roles, tear-down. Roles, registers, barriers and the schedule: design.md.
#pragma once

#include "sm90/dense_decode/hints.cuh"
#include "sm90/dense_decode/math.cuh"

namespace flash_mla::sm90::dense_decode {

template <class C>
__device__ __forceinline__ void init_barriers(Storage<C>& storage) {
  constexpr int kWarpsOfAWarpgroup = 4;
  for (int slot = 0; slot < 2; ++slot) {
    for (int group = 0; group < kNumGroups; ++group) {
      mbarrier_init(shared_address(&storage.k_full[slot][group]), 1);
      mbarrier_init(shared_address(&storage.k_empty[slot][group]), kWarpsOfAWarpgroup);
    }
  }
  mbarrier_init(shared_address(&storage.q_full), 1);
  mbarrier_init(shared_address(&storage.q_empty), 2 * kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.probabilities_full[0]), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.probabilities_full[1]), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.second_half_full), kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.row_sums_full), 2 * kWarpsOfAWarpgroup);
  mbarrier_init(shared_address(&storage.row_warps_turn[0]), 1);
  mbarrier_init(shared_address(&storage.row_warps_turn[1]), 1);
  fence_mbarrier_init();
}

// Nothing that this kernel reads may still be written by the kernels before it in the stream, the schedule included, so
// each role waits; and before that does what depends on the parameters alone, which also fetches these.
__device__ __forceinline__ Place wait_in_place(const DenseDecodeParams& params) {
  const Place place(params);
  asm volatile("" ::"r"(place.row_tile), "r"(place.kv_head), "r"(place.part), "r"(place.causal_cut));
  asm volatile("" ::"l"(params.q), "l"(params.k_cache), "l"(params.schedule), "l"(params.stride_q_b),
               "l"(params.stride_k_page), "l"(params.stride_table_b), "l"(params.stride_out_b),
               "l"(params.stride_lse_b), "r"(params.page_shift), "f"(params.scale_log2));
  wait_for_dependencies();
  // Not before the wait: the combine kernel reads the schedule as soon as it starts.
  launch_dependents();
  return place;
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(384, 1)
    dense_decode_kernel(const __grid_constant__ DenseDecodeParams params, const __grid_constant__ CacheMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  using C = Config<T, kHeadDim>;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  if (threadIdx.x == 0) {
    init_barriers(storage);
  } else if (threadIdx.x == 32) {
    tma_prefetch_descriptor(&maps.two_slices);
    tma_prefetch_descriptor(&maps.one_slice);
  }
  meet_and_ask_ahead<C>(params, maps);

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 2) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(C::kProducerRegisters));
    const int warp = __shfl_sync(~0u, threadIdx.x / 32 % 4, 0), lane = threadIdx.x % 32;
    // Where many CTAs share their keys, products are the limit, and a load must not wait for the other slot's release.
    // Where they do not, memory is, and the tile that is needed first should have all of it.
    const bool thread_per_slot = params.num_row_tiles > 2;
    if (warp == kTmaWarp || (warp == kSecondTmaWarp && thread_per_slot)) {
      if (params.box_rows > 0 && elect_one()) {
        const Place place = wait_in_place(params);
        const int slots = !thread_per_slot ? 3 : warp == kTmaWarp ? 1 : 2;
        TmaThread<C>(params, maps, storage, place, slots).run();
      }
    } else if (warp < kFirstRowWarp + kNumRowWarps) {
      const Place place = wait_in_place(params);
      RowWarps<C>::run(params, storage, place, warp - kFirstRowWarp, lane);
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(C::kMathRegisters));
    const Place place = wait_in_place(params);
    MathWarpgroup<C>(params, storage, place, warpgroup).run();
  }
#endif
}

}  // namespace flash_mla::sm90::dense_decode
