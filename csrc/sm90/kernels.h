// The tables of the Hopper kernels.
#pragma once

#include <span>

#include "core/kernel_table.h"
#include "core/params/dense_decode.h"

namespace flash_mla::sm90 {

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels();

}  // namespace flash_mla::sm90
