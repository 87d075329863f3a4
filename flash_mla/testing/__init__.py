"""Inputs, comparison and measurement for tests of attention kernels; shipped, so that engines can use them too."""

from flash_mla.testing.check import check_dense_decode, run_dense_decode
from flash_mla.testing.compare import Comparison, assert_close, compare
from flash_mla.testing.inputs import (
    Answer,
    DenseDecodeInputs,
    expected_dense_decode,
    make_dense_decode_inputs,
    make_schedule,
)

__all__ = [
    "Answer",
    "Comparison",
    "DenseDecodeInputs",
    "assert_close",
    "check_dense_decode",
    "compare",
    "expected_dense_decode",
    "make_dense_decode_inputs",
    "make_schedule",
    "run_dense_decode",
]
