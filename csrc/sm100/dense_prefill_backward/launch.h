// What the host code of the kernel table sees of the backward of dense prefill.
#pragma once

#include "core/params/dense_prefill_backward.h"

namespace flash_mla::sm100::dense_prefill_backward {

void launch_bf16_192(const DensePrefillBackwardParams& params, void* stream);
void launch_bf16_128(const DensePrefillBackwardParams& params, void* stream);
void launch_fp16_192(const DensePrefillBackwardParams& params, void* stream);
void launch_fp16_128(const DensePrefillBackwardParams& params, void* stream);

}  // namespace flash_mla::sm100::dense_prefill_backward
