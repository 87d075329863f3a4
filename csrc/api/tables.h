// The kernel tables of the ops: those of every architecture that is built, one behind the other.
#pragma once

#include <span>

#include "core/kernel_table.h"
#include "core/params/dense_decode.h"
#include "core/params/dense_prefill.h"
#include "core/params/dense_prefill_backward.h"
#include "core/params/sparse_attention.h"
#include "core/params/sparse_prefill_backward.h"

namespace flash_mla::api {

template <class Problem, class Params>
using KernelTable = std::span<const Kernel<Problem, Params>>;

KernelTable<DenseDecodeProblem, DenseDecodeParams> dense_decode_kernels();
KernelTable<SparseAttentionProblem, SparseAttentionParams> sparse_attention_kernels();
KernelTable<SparseAttentionProblem, SparsePrefillBackwardParams> sparse_prefill_backward_kernels();
KernelTable<DensePrefillProblem, DensePrefillParams> dense_prefill_kernels();
KernelTable<DensePrefillProblem, DensePrefillBackwardParams> dense_prefill_backward_kernels();

}  // namespace flash_mla::api
