"""Run a call through the public function and compare what it gives with the truth."""

from typing import Any

import torch
from torch import Tensor

from flash_mla.decode import flash_mla_with_kvcache
from flash_mla.schedule import FlashMLASchedMeta
from flash_mla.testing.compare import Comparison, assert_close
from flash_mla.testing.inputs import DenseDecodeInputs, expected_dense_decode


def run_dense_decode(
    inputs: DenseDecodeInputs,
    schedule: FlashMLASchedMeta | Tensor | None = None,
    num_splits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`flash_mla_with_kvcache` on `inputs`: (out, lse). Without a schedule, with one of its own."""
    if schedule is None and not options.get("enable_batch_invariant"):
        schedule = FlashMLASchedMeta()
    return flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=schedule, num_splits=num_splits, **options)


def check_dense_decode(
    inputs: DenseDecodeInputs,
    schedule: FlashMLASchedMeta | Tensor | None = None,
    num_splits: Tensor | None = None,
    *,
    result: tuple[Tensor, Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Comparison, Comparison]:
    """Decode, then compare out and lse with the truth.

    The call is made before the truth is computed, so that an output that was never written cannot hold the truth by
    chance.

    Args:
        inputs: of the call.
        schedule, num_splits: schedule of the call; by default, one of its own.
        result: check this (out, lse) in place of calling.
        compute_dtype: of the truth.
        **options: further arguments of the call.

    Returns:
        The statistics of out and of lse.

    Raises:
        AssertionError: naming the first bad coordinate.
    """
    out, lse = run_dense_decode(inputs, schedule, num_splits, **options) if result is None else result
    answer = expected_dense_decode(inputs, compute_dtype)
    return (
        assert_close("out", out, answer.out, answer.emulated_out),
        assert_close("lse", lse, answer.lse, answer.emulated_lse),
    )
