// The tables of the Blackwell kernels.
#pragma once

#include <span>

#include "core/kernel_table.h"
#include "core/params/dense_prefill.h"

namespace flash_mla::sm100 {

std::span<const Kernel<DensePrefillProblem, DensePrefillParams>> dense_prefill_kernels();

}  // namespace flash_mla::sm100
