#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode/launch.h"

void flash_mla::sm90::dense_decode::launch_bf16_512(const DenseDecodeParams& params, void* stream) {
  launch<__nv_bfloat16, 512>(params, stream);
}
