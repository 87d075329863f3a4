#include "sm90/dense_decode/launch.cuh"
#include "sm90/dense_decode/launch.h"

void flash_mla::sm90::dense_decode::launch_fp16_512(const DenseDecodeParams& params, void* stream) {
  launch<__half, 512>(params, stream);
}
