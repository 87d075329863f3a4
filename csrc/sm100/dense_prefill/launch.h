// What the host code of the kernel table sees of the dense prefill kernels.
#pragma once

#include "core/params/dense_prefill.h"

namespace flash_mla::sm100::dense_prefill {

void launch_bf16_192(const DensePrefillParams& params, void* stream);
void launch_bf16_128(const DensePrefillParams& params, void* stream);
void launch_fp16_192(const DensePrefillParams& params, void* stream);
void launch_fp16_128(const DensePrefillParams& params, void* stream);

}  // namespace flash_mla::sm100::dense_prefill
