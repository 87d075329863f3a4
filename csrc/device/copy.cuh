// Copies into shared memory: TMA tiles, 16-byte asynchronous copies; and stores of matrix fragments.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace flash_mla::inline device {

struct TmaCoordinates {
  int column, row, slice, head, page;
};

__device__ __forceinline__ void tma_prefetch_descriptor(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

__device__ __forceinline__ void tma_load(uint32_t destination, const CUtensorMap* map, const TmaCoordinates& at,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5, %6}], "
      "[%7];" ::"r"(destination),
      "l"(map), "r"(at.column), "r"(at.row), "r"(at.slice), "r"(at.head), "r"(at.page), "r"(barrier)
      : "memory");
}

// The same under an L2 policy.
__device__ __forceinline__ void tma_load_hinted(uint32_t destination, const CUtensorMap* map, const TmaCoordinates& at,
                                                uint32_t barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%2, %3, "
      "%4, %5, %6}], [%7], %8;" ::"r"(destination),
      "l"(map), "r"(at.column), "r"(at.row), "r"(at.slice), "r"(at.head), "r"(at.page), "r"(barrier), "l"(policy)
      : "memory");
}

// Asks L2 for the tile.
__device__ __forceinline__ void tma_prefetch(const CUtensorMap* map, const TmaCoordinates& at) {
  asm volatile("cp.async.bulk.prefetch.tensor.5d.L2.global [%0, {%1, %2, %3, %4, %5}];" ::"l"(map), "r"(at.column),
               "r"(at.row), "r"(at.slice), "r"(at.head), "r"(at.page)
               : "memory");
}

// Adds a tile in shared memory to one in global memory; part of the thread's group of bulk copies.
__device__ __forceinline__ void tma_add(const CUtensorMap* map, const TmaCoordinates& at, uint32_t source) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
      "r"(source), "r"(at.column), "r"(at.row), "r"(at.slice), "r"(at.head), "r"(at.page)
      : "memory");
}

// Copies so many bytes, a multiple of 16, from shared to global memory; part of the thread's group of bulk copies.
__device__ __forceinline__ void bulk_store(void* destination, uint32_t source, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(destination), "r"(source), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the last `kPending` groups of this thread have read their sources.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// They are done altogether.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes; zeros where `valid` is false, and then the source is not read.
__device__ __forceinline__ void async_copy16(uint32_t destination, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void async_copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void async_copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The same, always.
__device__ __forceinline__ void async_copy16(uint32_t destination, const void* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(destination), "l"(source) : "memory");
}

// Of what is read once: L2 need not keep it.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Of what is soon read again.
__device__ __forceinline__ uint64_t evict_last_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

__device__ __forceinline__ void store_hinted(void* address, const uint4& words, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.b32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(address), "r"(words.x), "r"(words.y),
               "r"(words.z), "r"(words.w), "l"(policy)
               : "memory");
}

// The 128 bytes at this address are not read before they are written again: L2 need not write them to memory.
__device__ __forceinline__ void discard_line(const void* address) {
  asm volatile("discard.global.L2 [%0], 128;" ::"l"(address) : "memory");
}

// 16 bytes under an L2 policy.
__device__ __forceinline__ void async_copy16_hinted(uint32_t destination, const void* source, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
               "l"(policy)
               : "memory");
}

__device__ __forceinline__ void async_copy8(uint32_t destination, const void* source) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(destination), "l"(source) : "memory");
}

// 16 bytes that L1 need not keep, without a branch around the load: `words` stay as they are where not wanted.
__device__ __forceinline__ void load_words_if(bool wanted, const void* source, uint4& words) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.b32 wanted, %5, 0;\n"
      "@wanted ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
      : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w)
      : "l"(source), "r"(static_cast<int>(wanted)));
}

__device__ __forceinline__ void store_words(uint32_t address, const uint4& words) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}

// One of the barrier's arrivals, once this thread's copies so far are done. Who waits for it has to order the copies
// before its own use by the async proxy.
__device__ __forceinline__ void async_copy_arrive(uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address) : "memory");
}

// Four 8 x 8 matrices of 16-bit values; each lane names the address of one row.
__device__ __forceinline__ void store_matrix_x4(uint32_t row, const uint32_t* fragment) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

// The other way round.
__device__ __forceinline__ void load_matrix_x4(uint32_t row, uint32_t (&fragment)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(row)
               : "memory");
}

// As `store_matrix_x4` with each matrix transposed: a lane's address is that of one column.
__device__ __forceinline__ void store_matrix_x4_transposed(uint32_t column, const uint32_t* fragment) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(column), "r"(fragment[0]),
               "r"(fragment[1]), "r"(fragment[2]), "r"(fragment[3])
               : "memory");
}

}  // namespace flash_mla::inline device
