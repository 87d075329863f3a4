// The tables of the Blackwell kernels.
#pragma once

#include <span>

#include "core/kernel_table.h"
#include "core/params/dense_decode.h"
#include "core/params/dense_prefill.h"
#include "core/params/dense_prefill_backward.h"
#include "core/params/sparse_attention.h"

namespace flash_mla::sm100 {

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels();

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels();

std::span<const Kernel<DensePrefillProblem, DensePrefillParams>> dense_prefill_kernels();
std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels();

}  // namespace flash_mla::sm100
