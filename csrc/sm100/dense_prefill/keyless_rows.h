// Rows that see no key: out 0 and lse +inf.
#pragma once

#include "core/params/dense_prefill.h"

namespace flash_mla::sm100::dense_prefill {

// Runs behind the kernel, which leaves rows of tiles without keys unwritten and divides 0 by 0 in others.
void launch_keyless_rows(const DensePrefillParams& params, void* stream);

}  // namespace flash_mla::sm100::dense_prefill
