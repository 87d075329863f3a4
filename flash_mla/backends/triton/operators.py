"""The operators `torch.ops.flash_mla.triton_*`. Importing this imports no Triton: the first call does."""

from typing import Any

import torch
from torch import Tensor

from flash_mla import _ops, errors, problem, problem_kv_cache, problem_prefill, problem_sparse
from flash_mla.backends import reference_sparse
from flash_mla.backends.triton import config, support
from flash_mla.kv_format import KVFormat


def _check_serves(tensor: Tensor, name: str) -> None:
    capability = None
    if tensor.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(tensor.device)
        capability = 10 * major + minor
    reason = support.why_not_on(tensor.device.type, capability)
    if reason is not None:
        raise errors.UnsupportedError(f"{name}: no backend takes the problem; triton: {reason}")


def _new_outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    b, s_q, h_q, _ = q.shape
    out = q.new_empty((b, s_q, h_q, problem.HEAD_DIM_V), dtype=problem.out_dtype(q))
    return out, q.new_empty((b, h_q, s_q), dtype=torch.float32)


def _dense_decode(*arguments: Any) -> None:
    q, k_cache, block_table, cache_seqlens, rows, splits, attn_sink, _, softmax_scale, causal, *rest = arguments
    batch_invariant, out, lse = rest
    _check_serves(q, "dense decode")
    from flash_mla.backends.triton import dense_decode as kernels

    call = kernels.Call(q, k_cache, block_table, cache_seqlens, attn_sink, softmax_scale, causal, out, lse)
    if batch_invariant:
        kernels.dense_decode_batch_invariant(call)
    else:
        kernels.dense_decode(call, rows, splits)


def dense_decode_out(*arguments: Any) -> None:
    """`torch.ops.flash_mla.triton_dense_decode_out`."""
    problem.check_dense_decode(*arguments)
    _dense_decode(*arguments)


def dense_decode(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_dense_decode`."""
    problem.check_dense_decode(*inputs)
    out, lse = _new_outputs(inputs[0])
    _dense_decode(*inputs, out, lse)
    return out, lse


def _dense_decode_fp8(*arguments: Any) -> None:
    q, k_cache, block_table, cache_seqlens, rows, splits, attn_sink, _, softmax_scale, causal, *rest = arguments
    batch_invariant, descale_q, descale_k, kv_format, out, lse = rest
    _check_serves(q, "dense decode")
    from flash_mla.backends.triton import dense_decode as kernels

    plain = kernels.Call(q, k_cache, block_table, cache_seqlens, attn_sink, softmax_scale, causal, out, lse)
    call = kernels.Call.of_bytes(plain, kv_format, descale_q, descale_k)
    if batch_invariant:
        kernels.dense_decode_batch_invariant(call)
    else:
        kernels.dense_decode(call, rows, splits)


def dense_decode_fp8_out(*arguments: Any) -> None:
    """`torch.ops.flash_mla.triton_dense_decode_fp8_out`."""
    problem.check_dense_decode_fp8(*arguments)
    _dense_decode_fp8(*arguments)


def dense_decode_fp8(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_dense_decode_fp8`."""
    problem.check_dense_decode_fp8(*inputs)
    out, lse = _new_outputs(inputs[0])
    _dense_decode_fp8(*inputs, out, lse)
    return out, lse


def plan_dense_decode(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_plan_dense_decode`."""
    problem.check_plan(cache_seqlens, s_q, h_q, h_kv)
    _check_serves(cache_seqlens, "planning")
    from flash_mla.backends.triton import plan

    return plan.plan_dense_decode(cache_seqlens, *config.num_parts(config.Gpu.of(cache_seqlens.device), s_q, h_q, h_kv))


def merge_attention_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_merge_attention_states`."""
    problem.check_merge(outs, lses)
    _check_serves(outs[0], "merging")
    from flash_mla.backends.triton import merge

    return merge.merge_attention_states(outs, lses)


def _keys_of(selected: tuple[Any, ...], kv_format: str, extra_kv_format: str | None) -> tuple[Any, Any]:
    """The `Keys` of a cache, its indices and lengths, and of those of a second cache, or None."""
    from flash_mla.backends.triton.sparse_decode import Keys

    cache, indices, length, extra_cache, extra_indices, extra_length = selected
    extra = None
    if extra_cache is not None and extra_kv_format is not None:
        extra = Keys.of(extra_cache, extra_kv_format, extra_indices, extra_length)
    return Keys.of(cache, kv_format, indices, length), extra


def _sparse_decode(*arguments: Any) -> None:
    q, *selected = arguments[:7]
    rows, splits, attn_sink, kv_format, extra_kv_format, _, softmax_scale, batch_invariant, out, lse = arguments[7:]
    _check_serves(q, "sparse decode")
    from flash_mla.backends.triton import sparse_decode as kernels

    keys = _keys_of(tuple(selected), kv_format, extra_kv_format)
    call = kernels.Call(q, *keys, attn_sink, softmax_scale, out, lse)
    if batch_invariant:
        kernels.sparse_decode_batch_invariant(call)
    else:
        kernels.sparse_decode(call, rows, splits)


def sparse_decode_out(*arguments: Any) -> None:
    """`torch.ops.flash_mla.triton_sparse_decode_out`."""
    problem_sparse.check_sparse_decode(*arguments)
    _sparse_decode(*arguments)


def sparse_decode(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_sparse_decode`."""
    problem_sparse.check_sparse_decode(*inputs)
    out, lse = _new_outputs(inputs[0])
    _sparse_decode(*inputs, out, lse)
    return out, lse


def _sparse_prefill(*arguments: Any) -> None:
    q, *selected = arguments[:7]
    attn_sink, kv_format, extra_kv_format, _, sm_scale, lse_base, _, *outputs = arguments[7:]
    _check_serves(q, "sparse prefill")
    from flash_mla.backends.triton import sparse_prefill as kernels

    keys = _keys_of(tuple(selected), kv_format, extra_kv_format)
    kernels.sparse_prefill(kernels.Call(q, *keys, attn_sink, sm_scale, lse_base, *outputs))


def sparse_prefill_out(*arguments: Any) -> None:
    """`torch.ops.flash_mla.triton_sparse_prefill_out`."""
    problem_sparse.check_sparse_prefill(*arguments)
    _sparse_prefill(*arguments)


def sparse_prefill(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_sparse_prefill`."""
    problem_sparse.check_sparse_prefill(*inputs)
    q, d_v = inputs[0], inputs[10]
    out = q.new_empty((*q.shape[:2], d_v))
    max_logits, lse = (q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2))
    _sparse_prefill(*inputs, out, max_logits, lse)
    return out, max_logits, lse


def dense_prefill(*inputs: Any) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_dense_prefill`."""
    problem_prefill.check_dense_prefill(*inputs)
    q, k, v, cu_seqlens_qo, cu_seqlens_kv, _, _, softmax_scale, causal, _ = inputs
    _check_serves(q, "dense prefill")
    from flash_mla.backends.triton import dense_prefill as kernels

    return kernels.dense_prefill(q, k, v, cu_seqlens_qo, cu_seqlens_kv, softmax_scale, causal)


def append_kv_cache(kv: Tensor, cache: Tensor, slot_mapping: Tensor, kv_format: str, exact_scale: bool) -> None:
    """`torch.ops.flash_mla.triton_append_kv_cache`."""
    problem_kv_cache.check_append(kv, cache, slot_mapping, kv_format, exact_scale)
    _check_serves(kv, "kv cache")
    from flash_mla.backends.triton import kv_cache as kernels

    kernels.append_kv_cache(kv, cache, slot_mapping, KVFormat(kv_format), exact_scale)


def dequantize_kv_cache(cache: Tensor, kv_format: str) -> Tensor:
    """`torch.ops.flash_mla.triton_dequantize_kv_cache`."""
    problem_kv_cache.check_dequantize(cache, kv_format)
    _check_serves(cache, "kv cache")
    from flash_mla.backends.triton import kv_cache as kernels

    return kernels.dequantize_kv_cache(cache, KVFormat(kv_format))


def plan_sparse_decode(
    requests: Tensor,
    topk_length: Tensor | None,
    extra_topk_length: Tensor | None,
    s_q: int,
    h_q: int,
    topk: int,
    extra_topk: int,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.triton_plan_sparse_decode`."""
    problem_sparse.check_sparse_plan(requests, topk_length, extra_topk_length, s_q, h_q, topk, extra_topk)
    _check_serves(requests, "planning")
    from flash_mla.backends.triton import plan

    blocks = reference_sparse.blocks_per_request(requests, topk_length, extra_topk_length, topk, extra_topk)
    keys = (blocks * problem.BLOCK_KEYS).to(torch.int32)  # as many keys as whole blocks have
    return plan.plan_dense_decode(keys, config.num_sparse_parts(config.Gpu.of(requests.device), s_q, h_q))


def fake_sparse_plan(requests: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """The shapes of a plan."""
    problem_sparse.check_sparse_plan(requests, *rest)
    parts = config.num_sparse_parts(config.Gpu.of(requests.device), *rest[2:4])
    rows = requests.new_empty((parts, problem.ROW_FIELDS), dtype=torch.int32)
    return rows, requests.new_empty((requests.shape[0] + 1,), dtype=torch.int32)


def fake_plan(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> tuple[Tensor, Tensor]:
    """The shapes of a plan."""
    problem.check_plan(cache_seqlens, s_q, h_q, h_kv)
    parts, _ = config.num_parts(config.Gpu.of(cache_seqlens.device), s_q, h_q, h_kv)
    new = cache_seqlens.new_empty
    return new((parts, problem.ROW_FIELDS)), new((cache_seqlens.shape[0] + 1,))


_FUNCTIONS = {
    "dense_decode": dense_decode,
    "dense_decode_out": dense_decode_out,
    "dense_decode_fp8": dense_decode_fp8,
    "dense_decode_fp8_out": dense_decode_fp8_out,
    "plan_dense_decode": plan_dense_decode,
    "merge_attention_states": merge_attention_states,
    "sparse_decode": sparse_decode,
    "sparse_decode_out": sparse_decode_out,
    "plan_sparse_decode": plan_sparse_decode,
    "sparse_prefill": sparse_prefill,
    "sparse_prefill_out": sparse_prefill_out,
    "dense_prefill": dense_prefill,
    "append_kv_cache": append_kv_cache,
    "dequantize_kv_cache": dequantize_kv_cache,
}
OPERATORS = tuple(_FUNCTIONS)
"""Operators that the backend has."""


def _register() -> None:
    _ops.define_twins("triton", OPERATORS, {"plan_dense_decode": fake_plan, "plan_sparse_decode": fake_sparse_plan})
    for name, function in _FUNCTIONS.items():
        _ops.implement(f"triton_{name}", function, "CompositeExplicitAutograd")


_register()
