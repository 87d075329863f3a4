// The tables of the Hopper kernels.
#pragma once

#include <span>

#include "core/kernel_table.h"
#include "core/params/dense_decode.h"
#include "core/params/dense_prefill.h"
#include "core/params/dense_prefill_backward.h"
#include "core/params/sparse_attention.h"
#include "core/params/sparse_prefill_backward.h"

namespace flash_mla::sm90 {

std::span<const Kernel<DenseDecodeProblem, DenseDecodeParams>> dense_decode_kernels();

std::span<const Kernel<SparseAttentionProblem, SparseAttentionParams>> sparse_attention_kernels();

std::span<const Kernel<SparseAttentionProblem, SparsePrefillBackwardParams>> sparse_prefill_backward_kernels();

std::span<const Kernel<DensePrefillProblem, DensePrefillParams>> dense_prefill_kernels();

std::span<const Kernel<DensePrefillProblem, DensePrefillBackwardParams>> dense_prefill_backward_kernels();

}  // namespace flash_mla::sm90
