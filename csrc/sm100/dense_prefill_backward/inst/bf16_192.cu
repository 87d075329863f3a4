#include "sm100/dense_prefill_backward/launch.cuh"
#include "sm100/dense_prefill_backward/launch.h"

void flash_mla::sm100::dense_prefill_backward::launch_bf16_192(const DensePrefillBackwardParams& params, void* stream) {
  launch<__nv_bfloat16, 192>(params, stream);
}
