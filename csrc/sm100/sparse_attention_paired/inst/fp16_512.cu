#include "sm100/sparse_attention_paired/launch.cuh"
#include "sm100/sparse_attention_paired/launch.h"

void flash_mla::sm100::sparse_attention_paired::launch_dense_fp16_512(const DenseDecodeParams& params, void* stream) {
  launch_dense<__half, 512>("sm100_dense_decode_paired_fp16_512", params, stream);
}
