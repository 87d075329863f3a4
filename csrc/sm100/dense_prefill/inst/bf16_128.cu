#include "sm100/dense_prefill/launch.cuh"
#include "sm100/dense_prefill/launch.h"

void flash_mla::sm100::dense_prefill::launch_bf16_128(const DensePrefillParams& params, void* stream) {
  launch<__nv_bfloat16, 128>(params, stream);
}
