// Work items on their way from a scheduler warp to the other warps of the CTA.
#pragma once

#include "device/barrier.cuh"
#include "device/slots.cuh"

namespace flash_mla::sm90 {

// Every warp of a role walks the same sequence of items by itself. `Storage` has items[2], item_full[2] and
// item_empty[2].
template <class Storage>
class ItemReader {
 public:
  using Item = typename Storage::WorkItem;

  explicit __device__ __forceinline__ ItemReader(Storage& storage) : storage_(storage) {}

  // The next item for a whole warp; false behind the last.
  __device__ __forceinline__ bool next(Item& item, int lane) {
    wait_and_read(item);
    __syncwarp();
    return finish(item, lane == 0);
  }

  // The same for a thread on its own.
  __device__ __forceinline__ bool next(Item& item) {
    wait_and_read(item);
    return finish(item, true);
  }

  // The next item where it lies, until it is given back.
  __device__ __forceinline__ const Item& borrow() const {
    mbarrier_wait(shared_address(&storage_.item_full[slot_.stage]), slot_.parity);
    return storage_.items[slot_.stage];
  }

  __device__ __forceinline__ void give_back(bool arrives) {
    mbarrier_arrive_if(shared_address(&storage_.item_empty[slot_.stage]), arrives);
    slot_.advance();
  }

 private:
  __device__ __forceinline__ void wait_and_read(Item& item) const {
    mbarrier_wait(shared_address(&storage_.item_full[slot_.stage]), slot_.parity);
    item = storage_.items[slot_.stage];
  }

  __device__ __forceinline__ bool finish(const Item& item, bool arrives) {
    if (arrives) {
      mbarrier_arrive(shared_address(&storage_.item_empty[slot_.stage]));
    }
    slot_.advance();
    return item.exists();
  }

  Storage& storage_;
  Ring<2> slot_;
};

}  // namespace flash_mla::sm90
