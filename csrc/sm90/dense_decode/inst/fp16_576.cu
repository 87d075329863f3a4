#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode/launch.h"

void flash_mla::sm90::dense_decode::launch_fp16_576(const DenseDecodeParams& params, void* stream) {
  launch<__half, 576>(params, stream);
}
