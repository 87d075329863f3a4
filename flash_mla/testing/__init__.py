"""Inputs, comparison and measurement for tests of attention kernels; shipped, so that engines can use them too."""

from flash_mla.testing.check import (
    check_decode,
    check_dense_decode,
    check_dense_prefill,
    check_dense_prefill_gradients,
    check_sparse_prefill,
    dense_prefill_gradients,
    run_decode,
    run_dense_decode,
)
from flash_mla.testing.compare import Comparison, assert_close, compare
from flash_mla.testing.fp8 import DenseFP8Inputs, expected_dense_fp8, make_dense_fp8_inputs
from flash_mla.testing.inputs import (
    Answer,
    DenseDecodeInputs,
    expected_dense_decode,
    make_dense_decode_inputs,
    make_schedule,
)
from flash_mla.testing.prefill import (
    DensePrefillInputs,
    expected_dense_prefill,
    expected_dense_prefill_gradients,
    make_dense_prefill_inputs,
    random_dense_prefill_gradients,
)
from flash_mla.testing.sparse import (
    Selected,
    SparseDecodeInputs,
    SparsePrefillInputs,
    expected_sparse_decode,
    expected_sparse_prefill,
    make_selected,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
    poisoned_cache,
)

__all__ = [
    "Answer",
    "Comparison",
    "DenseDecodeInputs",
    "DenseFP8Inputs",
    "DensePrefillInputs",
    "Selected",
    "SparseDecodeInputs",
    "SparsePrefillInputs",
    "assert_close",
    "check_decode",
    "check_dense_decode",
    "check_dense_prefill",
    "check_dense_prefill_gradients",
    "check_sparse_prefill",
    "compare",
    "dense_prefill_gradients",
    "expected_dense_decode",
    "expected_dense_fp8",
    "expected_dense_prefill",
    "expected_dense_prefill_gradients",
    "expected_sparse_decode",
    "expected_sparse_prefill",
    "make_dense_decode_inputs",
    "make_dense_fp8_inputs",
    "make_dense_prefill_inputs",
    "make_schedule",
    "make_selected",
    "make_sparse_decode_inputs",
    "make_sparse_prefill_inputs",
    "poisoned_cache",
    "random_dense_prefill_gradients",
    "run_decode",
    "run_dense_decode",
]
