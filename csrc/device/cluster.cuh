// Clusters of two CTAs: stores into the other one's shared memory, and barriers across both.
#pragma once

#include <cstdint>

namespace flash_mla::inline device {

__device__ __forceinline__ int cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// All threads of both CTAs; what was written before is visible behind it.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}

// The same place in the shared memory of the CTA of this rank, or of the other CTA.
__device__ __forceinline__ uint32_t address_in_rank(uint32_t address, int rank) {
  uint32_t mapped;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
}
__device__ __forceinline__ uint32_t peer_address(uint32_t address) {
  return address_in_rank(address, cluster_rank() ^ 1);
}

// Says that this thread has read what was sent to it. Of CTA scope, as CUTLASS's barriers of clusters: with the
// cluster's, it is a memory barrier of the whole GPU. It overtakes loads that have been issued and have not returned.
__device__ __forceinline__ void mbarrier_arrive_peer(uint32_t peer_barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(peer_barrier) : "memory");
}

// Stores whose bytes count on a barrier of the CTA that they go to, which is how that one waits for them.
__device__ __forceinline__ void store_peer(uint32_t peer, uint32_t a, uint32_t b, uint32_t c, uint32_t d,
                                           uint32_t peer_barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(peer),
      "r"(a), "r"(b), "r"(c), "r"(d), "r"(peer_barrier)
      : "memory");
}

__device__ __forceinline__ void store_peer(uint32_t peer, uint32_t value, uint32_t peer_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(peer), "r"(value),
               "r"(peer_barrier)
               : "memory");
}

__device__ __forceinline__ void store_peer(uint32_t peer, float a, float b, uint32_t peer_barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(peer),
               "f"(a), "f"(b), "r"(peer_barrier)
               : "memory");
}

}  // namespace flash_mla::inline device
