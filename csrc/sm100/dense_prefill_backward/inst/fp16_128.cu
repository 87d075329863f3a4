#include "sm100/dense_prefill_backward/launch.cuh"
#include "sm100/dense_prefill_backward/launch.h"

void flash_mla::sm100::dense_prefill_backward::launch_fp16_128(const DensePrefillBackwardParams& params, void* stream) {
  launch<__half, 128>(params, stream);
}
