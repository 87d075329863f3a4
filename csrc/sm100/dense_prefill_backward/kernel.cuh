// Set-up, the switch between the warp roles, tear-down. Roles, registers, pipelines and the schedule: design.md.
#pragma once

#include "device/sm100/tcgen05.cuh"
#include "sm100/dense_prefill_backward/adder.cuh"
#include "sm100/dense_prefill_backward/producer.cuh"

namespace flash_mla::sm100::dense_prefill_backward {

using OneCta = cute::Shape<cute::_1, cute::_1, cute::_1>;

template <class Pipeline>
constexpr auto category(Role role, Role producer, Role consumer) {
  using Category = typename Pipeline::ThreadCategory;
  return role == producer ? Category::Producer : role == consumer ? Category::Consumer : Category::NonParticipant;
}

// A pipeline's two roles, and how many threads of each arrive at its barriers.
struct Ends {
  Role producer, consumer;
  uint32_t producers, consumers;
};

template <class Pipeline>
__device__ __forceinline__ Pipeline make_pipeline(typename Pipeline::SharedStorage& storage, Role role,
                                                  const Ends& ends) {
  typename Pipeline::Params params;
  params.role = category<Pipeline>(role, ends.producer, ends.consumer);
  params.producer_arv_count = ends.producers;
  params.consumer_arv_count = ends.consumers;
  if constexpr (std::is_same_v<Pipeline, cutlass::PipelineAsync<Pipeline::Stages>>) {
    return Pipeline(storage, params);
  } else {
    return Pipeline(storage, params, OneCta{});
  }
}

// From TMA to the tensor cores.
template <class Pipeline>
__device__ __forceinline__ Pipeline make_load_pipeline(typename Pipeline::SharedStorage& storage, Role role,
                                                       uint32_t bytes) {
  typename Pipeline::Params params;
  params.role = category<Pipeline>(role, Role::kLoad, Role::kProducts);
  params.is_leader = role == Role::kLoad && cute::elect_one_sync();
  params.transaction_bytes = bytes;
  return Pipeline(storage, params, OneCta{});
}

// Items that take turns wait for smaller numbers, so a CTA takes its number when it runs.
__device__ __forceinline__ BackwardItem take_item(const DensePrefillBackwardParams& params) {
  PrefillPlan* plan = params.forward.plan;
  const int number = params.turns != nullptr ? atomicAdd(&plan->num_taken, 1) : static_cast<int>(blockIdx.x);
  return number < plan->num_items ? params.items[number] : BackwardItem{};
}

template <class T, int kHeadDim>
__global__ void __launch_bounds__(Config<T, kHeadDim>::kThreads, 1)
    dense_prefill_backward_kernel(const __grid_constant__ DensePrefillBackwardParams params,
                                  const __grid_constant__ TensorMaps maps) {
  using namespace cute;
  using cutlass::make_producer_start_state;
  using C = Config<T, kHeadDim>;
  using K = typename C::Cutlass;
  using Registers = typename K::RegisterAllocation;
  extern __shared__ __align__(1024) unsigned char shared[];
  auto& storage = *reinterpret_cast<Storage<C>*>(shared);
  const DensePrefillParams& forward = params.forward;
  const int warp = cutlass::canonical_warp_idx_sync(), lane = threadIdx.x % 32;
  const Role role = role_of(warp);

  constexpr uint32_t kMathThreads = 32 * K::kNumComputeWarps, kAdders = 32 * K::kNumReduceWarps;
  constexpr Ends kTerms{Role::kRowTerms, Role::kMath, 32, kMathThreads},
      kToMath{Role::kProducts, Role::kMath, 1, kMathThreads}, kToAdders{Role::kProducts, Role::kAdd, 1, kAdders},
      kFromMath{Role::kMath, Role::kProducts, kMathThreads, 1};
  auto& pipelines = storage.pipelines;
  auto q = make_load_pipeline<typename K::PipelineLoadMmaQ>(pipelines.load_mma_q, role, K::kTransactionsBytesLoadQ);
  auto d_out =
      make_load_pipeline<typename K::PipelineLoadMmaDO>(pipelines.load_mma_do, role, K::kTransactionsBytesLoadDO);
  auto lse = make_pipeline<typename K::PipelineLoadComputeLSE>(pipelines.load_compute_lse, role, kTerms);
  auto delta = make_pipeline<typename K::PipelineLoadComputeSumOdO>(pipelines.load_compute_sum_odo, role, kTerms);
  auto s = make_pipeline<typename K::PipelineMmaComputeS>(pipelines.mma_compute_s, role, kToMath);
  auto dp = make_pipeline<typename K::PipelineMmaComputeDP>(pipelines.mma_compute_dp, role, kToMath);
  auto dq = make_pipeline<typename K::PipelineMmaReduceDQ>(pipelines.mma_reduce_dq, role, kToAdders);
  auto p = make_pipeline<typename K::PipelineComputeMmaP>(pipelines.compute_mma_p, role, kFromMath);
  auto ds = make_pipeline<typename K::PipelineComputeMmaDS>(pipelines.compute_mma_ds, role, kFromMath);
  auto dk_dv = make_pipeline<typename K::PipelineMmaComputeDKDV>(pipelines.mma_compute_dkdv, role, kToMath);

  // Nothing that this kernel reads may still be written by the kernels before it in the stream.
  wait_for_dependencies();
  launch_dependents();
  if (threadIdx.x == 0) {
    storage.item = take_item(params);
  }
  __syncthreads();
  const BackwardItem& item = storage.item;
  if (item.num_keys == 0) {
    return;
  }

  // To CUTLASS's parts this item is all there is: its keys, and its tiles of queries, begin at 0.
  const int tiles = ceil_div(item.num_queries, kBackwardQueryTile) - item.first_tile;
  const int steps = item.num_queries > 0 ? tiles * forward.group : 0;
  const typename C::ItemShape shape =
      make_tuple(tiles * kBackwardQueryTile, item.num_keys, Int<kHeadDim>{}, Int<kPrefillHeadDimV>{},
                 make_tuple(item.limit + item.first_tile * kBackwardQueryTile, static_cast<int>(forward.causal)));
  const auto place = make_coord(0, 0, 0, 0, make_coord(0, 0));
  typename K::MainloopArguments scale{};
  scale.softmax_scale = forward.softmax_scale;
  const int64_t first_row = static_cast<int64_t>(item.first_key) * forward.h_kv + item.kv_head;
  const auto row_stride = [&](int columns) {
    return typename K::TensorStride(forward.h_kv * columns, _1{}, make_stride(0, 0));
  };
  const typename K::EpilogueArguments gradients{
      static_cast<typename C::Element*>(params.dk) + first_row * kHeadDim, row_stride(kHeadDim),
      static_cast<typename C::Element*>(params.dv) + first_row * kPrefillHeadDimV, row_stride(kPrefillHeadDimV)};
  K kernel;
  if (steps == 0) {
    kernel.epilogue_clear(place, place, shape, scale, gradients);
    return;
  }

  if (role == Role::kAdd) {
    take_registers<Registers::kReduce>();
    add<C>(params, maps, item, storage.tensors, dq);
  } else if (role == Role::kMath) {
    take_registers<Registers::kCompute>();
    typename K::PipelineLoadComputeLSE::PipelineState lse_state;
    typename K::PipelineLoadComputeSumOdO::PipelineState delta_state;
    typename K::PipelineMmaComputeS::PipelineState s_state;
    typename K::PipelineMmaComputeDP::PipelineState dp_state;
    auto p_state = make_producer_start_state<typename K::PipelineComputeMmaP>();
    auto ds_state = make_producer_start_state<typename K::PipelineComputeMmaDS>();
    typename K::PipelineMmaComputeDKDV::PipelineState dk_dv_state;
    kernel.compute(place, place, shape, 0, steps, scale, gradients, storage.tensors, lse, lse_state, delta, delta_state,
                   s, s_state, dp, dp_state, p, p_state, ds, ds_state, dk_dv, dk_dv_state);
  } else {
    keep_registers<Registers::kEmpty>();
    if (role == Role::kProducts) {
      tmem_allocate(shared_address(&storage.tensor_memory), kTmemColumns);
      typename K::PipelineLoadMmaQ::PipelineState q_state;
      typename K::PipelineLoadMmaDO::PipelineState d_out_state;
      auto s_state = make_producer_start_state<typename K::PipelineMmaComputeS>();
      auto dp_state = make_producer_start_state<typename K::PipelineMmaComputeDP>();
      auto dq_state = make_producer_start_state<typename K::PipelineMmaReduceDQ>();
      typename K::PipelineComputeMmaP::PipelineState p_state;
      typename K::PipelineComputeMmaDS::PipelineState ds_state;
      auto dk_dv_state = make_producer_start_state<typename K::PipelineMmaComputeDKDV>();
      kernel.mma(place, shape, 0, steps, scale, storage.tensors, q, q_state, d_out, d_out_state, s, s_state, dp,
                 dp_state, dq, dq_state, p, p_state, ds, ds_state, dk_dv, dk_dv_state);
    } else if (role == Role::kLoad) {
      load<C>(forward, maps, item, storage.tensors, q, d_out);
    } else if (role == Role::kRowTerms) {
      load_row_terms<C>(params, item, lane, storage.tensors, lse, delta);
    }
  }
  tcgen05_fence_before();
  __syncthreads();
  if (role == Role::kProducts) {
    tcgen05_fence_after();
    tmem_free(storage.tensor_memory, kTmemColumns);
  }
}

}  // namespace flash_mla::sm100::dense_prefill_backward
