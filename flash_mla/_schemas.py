"""Schemas, fake (meta) functions and gradients of the operators beside dense decode over bf16 and fp16 caches."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla import problem, problem_kv_cache, problem_prefill, problem_sparse
from flash_mla.kv_format import KVFormat

_DENSE_FP8_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? tile_scheduler_metadata, "
    "Tensor? num_splits, Tensor? attn_sink, int head_dim_v, float softmax_scale, bool causal, bool batch_invariant, "
    "Tensor? descale_q, Tensor? descale_k, str? kv_format"
)
_SPARSE_INDICES = (
    "Tensor indices, Tensor? topk_length, Tensor? extra_k_cache, Tensor? extra_indices, Tensor? extra_topk_length"
)
_SPARSE_DECODE_INPUTS = (
    f"Tensor q, Tensor k_cache, {_SPARSE_INDICES}, Tensor? tile_scheduler_metadata, Tensor? num_splits, "
    "Tensor? attn_sink, str kv_format, str? extra_kv_format, int head_dim_v, float softmax_scale, bool batch_invariant"
)
_SPARSE_PREFILL_INPUTS = (
    f"Tensor q, Tensor kv, {_SPARSE_INDICES}, Tensor? attn_sink, str kv_format, str? extra_kv_format, int d_v, "
    "float sm_scale, str lse_base, bool deterministic"
)
_DENSE_PREFILL_OPTIONS = (
    "Tensor cu_seqlens_qo, Tensor cu_seqlens_kv, int max_seqlen_qo, int max_seqlen_kv, float softmax_scale, "
    "bool causal, bool deterministic"
)

SCHEMAS = {
    "dense_decode_fp8": f"({_DENSE_FP8_INPUTS}) -> (Tensor, Tensor)",
    "dense_decode_fp8_out": f"({_DENSE_FP8_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "sparse_decode": f"({_SPARSE_DECODE_INPUTS}) -> (Tensor, Tensor)",
    "sparse_decode_out": f"({_SPARSE_DECODE_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "plan_sparse_decode": (
        "(Tensor requests, Tensor? topk_length, Tensor? extra_topk_length, int s_q, int h_q, int topk, int extra_topk)"
        " -> (Tensor, Tensor)"
    ),
    "sparse_prefill": f"({_SPARSE_PREFILL_INPUTS}) -> (Tensor, Tensor, Tensor)",
    "sparse_prefill_out": (f"({_SPARSE_PREFILL_INPUTS}, Tensor(a!) out, Tensor(b!) max_logits, Tensor(c!) lse) -> ()"),
    "sparse_prefill_backward": (
        f"(Tensor d_out, Tensor d_lse, Tensor q, Tensor kv, {_SPARSE_INDICES}, Tensor? attn_sink, str kv_format, "
        "str? extra_kv_format, float sm_scale, str lse_base, bool deterministic, Tensor out, Tensor lse)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "dense_prefill": f"(Tensor q, Tensor k, Tensor v, {_DENSE_PREFILL_OPTIONS}) -> (Tensor, Tensor)",
    "dense_prefill_backward": (
        f"(Tensor d_out, Tensor d_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_DENSE_PREFILL_OPTIONS})"
        " -> (Tensor, Tensor, Tensor)"
    ),
    "append_kv_cache": "(Tensor kv, Tensor(a!) cache, Tensor slot_mapping, str kv_format, bool exact_scale) -> ()",
    "dequantize_kv_cache": "(Tensor cache, str kv_format) -> Tensor",
}


# ---- Fake functions.


def _decode_outputs(q: Tensor, head_dim_v: int) -> tuple[Tensor, Tensor]:
    b, s_q, h_q, _ = q.shape
    out = q.new_empty((b, s_q, h_q, head_dim_v), dtype=problem.out_dtype(q))
    return out, q.new_empty((b, h_q, s_q), dtype=torch.float32)


def _fake_dense_decode_fp8(*args: Any) -> tuple[Tensor, Tensor]:
    problem.check_dense_decode_fp8(*args)
    return _decode_outputs(args[0], args[7])


def _fake_dense_decode_fp8_out(*args: Any) -> None:
    problem.check_dense_decode_fp8(*args)


def _fake_sparse_decode(*args: Any) -> tuple[Tensor, Tensor]:
    problem_sparse.check_sparse_decode(*args)
    return _decode_outputs(args[0], args[12])


def _fake_sparse_decode_out(*args: Any) -> None:
    problem_sparse.check_sparse_decode(*args)


def _fake_plan_sparse_decode(requests: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    problem_sparse.check_sparse_plan(requests, *rest)
    return sparse_plan_of(requests, problem.REFERENCE_PARTS)


def sparse_plan_of(requests: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """The tensors of a sparse plan of so many parts, empty."""
    rows = requests.new_empty((parts, problem.ROW_FIELDS), dtype=torch.int32)
    return rows, requests.new_empty((requests.shape[0] + 1,), dtype=torch.int32)


def _fake_sparse_prefill(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    problem_sparse.check_sparse_prefill(*args)
    q, d_v = args[0], args[10]
    s_q, h_q, _ = q.shape
    rows = (s_q, h_q)
    out = q.new_empty((*rows, d_v))
    return out, q.new_empty(rows, dtype=torch.float32), q.new_empty(rows, dtype=torch.float32)


def _fake_sparse_prefill_out(*args: Any) -> None:
    problem_sparse.check_sparse_prefill(*args)


def _fake_sparse_prefill_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    kv_format: str,
    extra_kv_format: str | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def like(cache: Tensor | None, known: str | None) -> Tensor:
        has_gradient = cache is not None and known == KVFormat.BF16
        return q.new_empty(cache.shape if cache is not None and has_gradient else 0)

    d_sink = q.new_empty(0 if attn_sink is None else attn_sink.shape, dtype=torch.float32)
    return q.new_empty(q.shape), like(kv, kv_format), like(extra_k_cache, extra_kv_format), d_sink


def _fake_dense_prefill(*args: Any) -> tuple[Tensor, Tensor]:
    problem_prefill.check_dense_prefill(*args)
    q, v = args[0], args[2]
    tokens, h_q, _ = q.shape
    return q.new_empty((tokens, h_q, v.shape[2])), q.new_empty((h_q, tokens), dtype=torch.float32).t()


def _fake_dense_prefill_backward(
    d_out: Tensor, d_lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_append(*args: Any) -> None:
    problem_kv_cache.check_append(*args)


def _fake_dequantize(cache: Tensor, kv_format: str) -> Tensor:
    problem_kv_cache.check_dequantize(cache, kv_format)
    num_blocks, page = cache.shape[:2]
    return cache.new_empty((num_blocks, page, 1, KVFormat(kv_format).d_qk_of(cache)), dtype=torch.bfloat16)


FAKES: dict[str, Callable[..., Any]] = {
    "dense_decode_fp8": _fake_dense_decode_fp8,
    "dense_decode_fp8_out": _fake_dense_decode_fp8_out,
    "sparse_decode": _fake_sparse_decode,
    "sparse_decode_out": _fake_sparse_decode_out,
    "plan_sparse_decode": _fake_plan_sparse_decode,
    "sparse_prefill": _fake_sparse_prefill,
    "sparse_prefill_out": _fake_sparse_prefill_out,
    "sparse_prefill_backward": _fake_sparse_prefill_backward,
    "dense_prefill": _fake_dense_prefill,
    "dense_prefill_backward": _fake_dense_prefill_backward,
    "append_kv_cache": _fake_append,
    "dequantize_kv_cache": _fake_dequantize,
}


# ---- Gradients.


@dataclass(frozen=True)
class Gradient:
    """How an operator is differentiated: what `torch.library.register_autograd` takes."""

    setup_context: Callable[..., None]
    backward: Callable[..., Any]


def _or_zeros(gradient: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if gradient is None else gradient


def sparse_prefill_gradient(backward_op: Callable[..., Any]) -> Gradient:
    """Gradients of q, of BF16 caches and of the sink; max_logits has none."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        out, max_logits, lse = output
        *tensors, kv_format, extra_kv_format, _, sm_scale, lse_base, deterministic = inputs
        ctx.mark_non_differentiable(max_logits)
        ctx.save_for_backward(*tensors, out, lse)
        ctx.options = (kv_format, extra_kv_format, sm_scale, lse_base, deterministic)

    def backward(ctx: Any, d_out: Tensor | None, _: Any, d_lse: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        # A gradient of a sum or a slice may be expanded or strided, which kernels do not take.
        d_out, d_lse = _or_zeros(d_out, out).contiguous(), _or_zeros(d_lse, lse)
        d_q, d_kv, d_extra, d_sink = backward_op(d_out, d_lse, *tensors, *ctx.options, out, lse)
        gradients: list[Tensor | None] = [None] * 14
        for position, gradient in ((0, d_q), (1, d_kv), (4, d_extra), (7, d_sink)):
            if needs[position]:
                gradients[position] = gradient
        return tuple(gradients)

    return Gradient(setup_context, backward)


def dense_prefill_gradient(backward_op: Callable[..., Any]) -> Gradient:
    """Gradients of q, k and v."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, *options = inputs
        ctx.save_for_backward(q, k, v, *output, cu_seqlens_qo, cu_seqlens_kv)
        ctx.options = options

    def backward(ctx: Any, d_out: Tensor | None, d_lse: Tensor | None) -> tuple[Any, ...]:
        _, _, _, out, lse, _, _ = ctx.saved_tensors
        # A gradient of a sum or a slice may be expanded or strided, which kernels do not take.
        d_out, d_lse = _or_zeros(d_out, out).contiguous(), _or_zeros(d_lse, lse)
        d_q, d_k, d_v = backward_op(d_out, d_lse, *ctx.saved_tensors, *ctx.options)
        return d_q, d_k, d_v, *[None] * 7

    return Gradient(setup_context, backward)


GRADIENTS: dict[str, Callable[[Callable[..., Any]], Gradient]] = {
    "sparse_prefill": sparse_prefill_gradient,
    "dense_prefill": dense_prefill_gradient,
}
"""By operator: its gradient, made from the operator `<name>_backward`."""
