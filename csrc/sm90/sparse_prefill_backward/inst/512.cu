#include "sm90/sparse_prefill_backward/launch.cuh"
#include "sm90/sparse_prefill_backward/launch.h"

void flash_mla::sm90::sparse_prefill_backward::launch_512(const SparsePrefillBackwardParams& params, void* stream) {
  launch<512>(params, stream);
}
