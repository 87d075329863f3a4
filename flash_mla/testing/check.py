"""Run a call through the public function and compare what it gives with the truth."""

from typing import Any

import torch
from torch import Tensor

from flash_mla.decode import flash_mla_with_kvcache
from flash_mla.prefill import flash_attn_varlen_func, flash_mla_sparse_fwd
from flash_mla.schedule import FlashMLASchedMeta
from flash_mla.testing.compare import Comparison, assert_close
from flash_mla.testing.fp8 import DenseFP8Inputs, expected_dense_fp8
from flash_mla.testing.inputs import DenseDecodeInputs, expected_dense_decode
from flash_mla.testing.prefill import (
    DensePrefillInputs,
    expected_dense_prefill,
    expected_dense_prefill_gradients,
    random_dense_prefill_gradients,
)
from flash_mla.testing.sparse import (
    SparseDecodeInputs,
    SparsePrefillInputs,
    expected_sparse_decode,
    expected_sparse_prefill,
    expected_sparse_prefill_gradients,
    random_sparse_prefill_gradients,
)

DecodeInputs = DenseDecodeInputs | DenseFP8Inputs | SparseDecodeInputs


def run_decode(
    inputs: DecodeInputs,
    schedule: FlashMLASchedMeta | Tensor | None = None,
    num_splits: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """`flash_mla_with_kvcache` on `inputs`: (out, lse). Without a schedule, with one of its own."""
    if schedule is None and not options.get("enable_batch_invariant"):
        schedule = FlashMLASchedMeta()
    return flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=schedule, num_splits=num_splits, **options)


run_dense_decode = run_decode


def check_decode(
    inputs: DecodeInputs,
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
    out, lse = run_decode(inputs, schedule, num_splits, **options) if result is None else result
    if isinstance(inputs, SparseDecodeInputs):
        answer = expected_sparse_decode(inputs, compute_dtype)
    elif isinstance(inputs, DenseFP8Inputs):
        answer = expected_dense_fp8(inputs, compute_dtype)
    else:
        answer = expected_dense_decode(inputs, compute_dtype)
    return (
        assert_close("out", out, answer.out, answer.emulated_out),
        assert_close("lse", lse, answer.lse, answer.emulated_lse),
    )


check_dense_decode = check_decode


def check_sparse_prefill(
    inputs: SparsePrefillInputs,
    *,
    result: tuple[Tensor, Tensor, Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Comparison, Comparison, Comparison]:
    """Call `flash_mla_sparse_fwd`, then compare out, max_logits and lse (of base e) with the truth.

    Args:
        inputs: of the call.
        result: check this (out, max_logits, lse) in place of calling.
        compute_dtype: of the truth.
        **options: further arguments of the call.

    Raises:
        AssertionError: naming the first bad coordinate.
    """
    out, max_logits, lse = flash_mla_sparse_fwd(**{**inputs.call(), **options}) if result is None else result
    answer = expected_sparse_prefill(inputs, compute_dtype)
    return (
        assert_close("out", out, answer.out, answer.emulated_out),
        assert_close("max_logits", max_logits, answer.max_logits, answer.emulated_max_logits),
        assert_close("lse", lse, answer.lse, answer.emulated_lse),
    )


def sparse_prefill_gradients(
    inputs: SparsePrefillInputs, d_out: Tensor, d_lse: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Gradients of q, of bfloat16 caches and of the sink by autograd through `flash_mla_sparse_fwd`, by argument."""
    call = {**inputs.call(), **options}
    leaves = {
        name: call[name].detach().requires_grad_()
        for name in ("q", "kv", "extra_k_cache", "attn_sink")
        if call[name] is not None and call[name].is_floating_point() and call[name].element_size() > 1
    }
    out, _, lse = flash_mla_sparse_fwd(**{**call, **leaves})
    gradients = torch.autograd.grad((out, lse), tuple(leaves.values()), (d_out, d_lse))
    return dict(zip(leaves, gradients, strict=True))


def check_sparse_prefill_gradients(
    inputs: SparsePrefillInputs, *, seed: int = 0, result: dict[str, Tensor] | None = None, **options: Any
) -> dict[str, Comparison]:
    """Gradients for random ones of out and lse, compared with the truth.

    Not that of the sink of one head: the tolerance comes from an emulation, whose error in one number may be near 0.

    Args:
        inputs: of the call.
        seed: of the gradients of out and lse that `random_sparse_prefill_gradients` gives.
        result: check these gradients in place of calling.
        **options: further arguments of the call.

    Raises:
        AssertionError: naming the first bad coordinate.
    """
    d_out, d_lse = random_sparse_prefill_gradients(inputs, seed)
    gradients = sparse_prefill_gradients(inputs, d_out, d_lse, **options) if result is None else result
    truth = expected_sparse_prefill_gradients(inputs, d_out, d_lse)
    emulation = expected_sparse_prefill_gradients(inputs, d_out, d_lse, torch.float32, inputs.q.dtype)
    if inputs.q.shape[1] == 1:
        gradients = {name: each for name, each in gradients.items() if name != "attn_sink"}
    return {
        name: assert_close(f"d_{name}", *map(torch.atleast_2d, (given, truth[name], emulation[name].to(given.dtype))))
        for name, given in gradients.items()
    }


def check_dense_prefill(
    inputs: DensePrefillInputs,
    *,
    result: tuple[Tensor, Tensor] | None = None,
    compute_dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Comparison, Comparison]:
    """Call `flash_attn_varlen_func`, then compare out and lse with the truth.

    Args:
        inputs: of the call.
        result: check this (out, lse) in place of calling.
        compute_dtype: of the truth.
        **options: further arguments of the call.

    Raises:
        AssertionError: naming the first bad coordinate.
    """
    out, lse = flash_attn_varlen_func(**{**inputs.call(), **options}) if result is None else result
    answer = expected_dense_prefill(inputs, compute_dtype)
    return (
        assert_close("out", out, answer.out, answer.emulated_out),
        assert_close("lse", lse, answer.lse, answer.emulated_lse),
    )


def dense_prefill_gradients(
    inputs: DensePrefillInputs, d_out: Tensor, d_lse: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v by autograd through `flash_attn_varlen_func`."""
    leaves = {name: getattr(inputs, name).detach().requires_grad_() for name in ("q", "k", "v")}
    results = flash_attn_varlen_func(**{**inputs.call(), **leaves, **options})
    return torch.autograd.grad(results, tuple(leaves.values()), (d_out, d_lse))


def check_dense_prefill_gradients(
    inputs: DensePrefillInputs, *, seed: int = 0, result: tuple[Tensor, ...] | None = None, **options: Any
) -> tuple[Comparison, ...]:
    """Gradients of q, k and v for random ones of out and lse, compared with the truth.

    Args:
        inputs: of the call.
        seed: of the gradients of out and lse that `random_dense_prefill_gradients` gives.
        result: check these gradients in place of calling.
        **options: further arguments of the call.

    Raises:
        AssertionError: naming the first bad coordinate.
    """
    d_out, d_lse = random_dense_prefill_gradients(inputs, seed)
    gradients = dense_prefill_gradients(inputs, d_out, d_lse, **options) if result is None else result
    truth = expected_dense_prefill_gradients(inputs, d_out, d_lse)
    emulation = expected_dense_prefill_gradients(inputs, d_out, d_lse, torch.float32, inputs.q.dtype)
    return tuple(
        assert_close(name, one, true, emulated.to(inputs.q.dtype))
        for name, one, true, emulated in zip(("d_q", "d_k", "d_v"), gradients, truth, emulation, strict=True)
    )
