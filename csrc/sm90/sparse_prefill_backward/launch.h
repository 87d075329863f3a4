// What the host code of the kernel table sees of the backward of sparse prefill.
#pragma once

#include "core/params/sparse_prefill_backward.h"

namespace flash_mla::sm90::sparse_prefill_backward {

void launch_576(const SparsePrefillBackwardParams& params, void* stream);
void launch_512(const SparsePrefillBackwardParams& params, void* stream);

}  // namespace flash_mla::sm90::sparse_prefill_backward
