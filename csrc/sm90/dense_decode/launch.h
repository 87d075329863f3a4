// What the host code of the kernel table sees of the dense decode kernel.
#pragma once

#include "core/params/dense_decode.h"

namespace flash_mla::sm90::dense_decode {

void launch_bf16_576(const DenseDecodeParams& params, void* stream);
void launch_bf16_512(const DenseDecodeParams& params, void* stream);
void launch_fp16_576(const DenseDecodeParams& params, void* stream);
void launch_fp16_512(const DenseDecodeParams& params, void* stream);

}  // namespace flash_mla::sm90::dense_decode
