"""`flash_mla_with_kvcache`: attention of new queries over a paged cache."""

from typing import Any

import torch
from torch import Tensor

from flash_mla import backends, errors, problem
from flash_mla.backends import reference
from flash_mla.kv_cache import KVFormat
from flash_mla.schedule import FlashMLASchedMeta


def flash_mla_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor | None,
    cache_seqlens: Tensor | None,
    head_dim_v: int,
    tile_scheduler_metadata: FlashMLASchedMeta | Tensor | None,
    num_splits: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    is_fp8_kvcache: bool = False,
    indices: Tensor | None = None,
    attn_sink: Tensor | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    topk_length: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    *,
    kv_format: KVFormat | str | None = None,
    enable_batch_invariant: bool = False,
    descale_q: Tensor | None = None,
    descale_k: Tensor | None = None,
    out: Tensor | None = None,
    lse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention of `q` over a paged KV cache; V is the first 512 values of each cache row.

    Dense (`indices` is None): every query sees the `cache_seqlens[i]` keys of its request, or with `causal` those
    `< cache_seqlens[i] - (s_q - 1 - j)` for query j. `lse = ln(sum_i exp(scale * q . k_i))` and
    `out = sum_i exp(scale * q . k_i - lse) v_i * exp(lse) / (exp(lse) + exp(sink))`. A query without keys gets out 0
    and lse +inf. Not differentiable: the results never require a gradient.

    Args:
        q: `[b, s_q, h_q, d_qk]` bfloat16 or float16, last dimension contiguous; d_qk 576 or 512.
        k_cache: `[num_blocks, page_block_size, h_kv, d_qk]`, dtype of q, last dimension contiguous; `h_q % h_kv == 0`.
        block_table: int32 `[b, max_blocks]`; entries past the length are never used.
        cache_seqlens: int32 `[b]`, keys per request, 0 included.
        head_dim_v: 512.
        tile_scheduler_metadata: what `get_mla_metadata` returned first (planned by the first call, reused by later
            ones), or the int32 `[num_sm_parts, 8]` tensor of `get_mla_decoding_metadata`. Not read, and may be None,
            with `enable_batch_invariant`.
        num_splits: int32 `[b + 1]` beside such a tensor, else None.
        softmax_scale: factor on the scores; None stands for `d_qk ** -0.5`.
        causal: mask aligned to the bottom right.
        is_fp8_kvcache: the cache is FP8 (not built yet).
        indices: int32 `[b, s_q, topk]`, sparse decode (not built yet), with `topk_length`, `extra_k_cache`,
            `extra_indices_in_kvcache` and `extra_topk_length`.
        attn_sink: float32 `[h_q]`, natural-log units, not multiplied by the scale; not part of lse.
        kv_format: format of an FP8 cache (not built yet).
        enable_batch_invariant: the bits of a request do not depend on the rest of the batch.
        descale_q: scale of an FP8 q (not built yet).
        descale_k: scale of a per-tensor FP8 cache (not built yet).
        out: where to write out: shape and dtype of the result, last dimension contiguous.
        lse: where to write lse.

    Returns:
        out `[b, s_q, h_q, 512]` in q's dtype and lse float32 `[b, h_q, s_q]`, natural log.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came; also when the call does not fit the
            shape that the metadata was planned for.
        UnsupportedError: valid, but not built or not served by this device; lists each candidate and its reason.
    """
    if (
        indices is not None
        or is_fp8_kvcache
        or extra_k_cache is not None
        or extra_indices_in_kvcache is not None
        or topk_length is not None
        or extra_topk_length is not None
        or kv_format is not None
        or descale_q is not None
        or descale_k is not None
    ):
        _check_unusual(
            k_cache,
            causal,
            is_fp8_kvcache,
            indices,
            extra_k_cache,
            extra_indices_in_kvcache,
            topk_length,
            extra_topk_length,
            kv_format,
            descale_q,
            descale_k,
        )
    arguments = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        head_dim_v,
        tile_scheduler_metadata,
        num_splits,
        softmax_scale,
        causal,
        attn_sink,
        enable_batch_invariant,
        out,
        lse,
    )
    # No check stands before the operator: it makes its own, in C++. Only when it refuses do Python's find the words.
    try:
        return _dense_decode(backends.active, *arguments)
    except Exception as error:
        return _explain_or_reroute(error, *arguments)


def _dense_decode(
    operators: backends.Operators,
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    head_dim_v: Any,
    schedule: Any,
    num_splits: Any,
    softmax_scale: Any,
    causal: Any,
    attn_sink: Any,
    batch_invariant: Any,
    out: Any,
    lse: Any,
) -> tuple[Tensor, Tensor]:
    """Plan if there is no plan, then decode. Host time counts here: it runs on every call."""
    rows, splits = schedule, num_splits
    first_call = False
    q_shape = q.shape
    if softmax_scale is None:
        softmax_scale = q_shape[-1] ** -0.5
    if batch_invariant:
        rows = splits = None
    elif isinstance(schedule, FlashMLASchedMeta):
        rows, splits = schedule.tile_scheduler_metadata, schedule.num_splits
        if rows is None or splits is None:
            first_call = True
            rows, splits = operators.plan_dense_decode(cache_seqlens, q_shape[1], q_shape[2], k_cache.shape[2])
        elif schedule.have_initialized:
            schedule.check_dense(q_shape, k_cache.shape, causal)
        else:  # the caller wrote the rows
            first_call = True
    inputs = (
        q,
        k_cache,
        block_table,
        cache_seqlens,
        rows,
        splits,
        attn_sink,
        head_dim_v,
        softmax_scale,
        causal,
        batch_invariant,
    )
    if out is None and lse is None:
        out, lse = operators.dense_decode(*inputs)
    else:
        b, s_q, h_q, _ = q_shape
        if out is None:
            out = q.new_empty((b, s_q, h_q, head_dim_v))
        if lse is None:
            lse = q.new_empty((b, h_q, s_q), dtype=torch.float32)
        operators.dense_decode_out(*inputs, out, lse)
    if first_call:
        # Kept only now, when the operator has accepted the arguments that the plan was made from.
        schedule.tile_scheduler_metadata, schedule.num_splits = rows, splits
        schedule.adopt_dense(q_shape, k_cache.shape, causal)
    return out, lse


def _explain_or_reroute(error: Exception, *arguments: Any) -> tuple[Tensor, Tensor]:
    """After a refused call: raise the error that names the argument; or let the next backend serve what the CUDA
    kernels do not take.

    Only an operator that declined before any launch gets here with `UnsupportedError`. Every other failure is raised.
    """
    q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, num_splits, scale, causal, sink, *rest = arguments
    batch_invariant, out, lse = rest
    if scale is None and isinstance(q, Tensor) and q.dim() > 0:
        scale = problem.default_softmax_scale(q.shape[-1])
    problem.check_flag("enable_batch_invariant", batch_invariant)
    problem.check_dense_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        None,
        None,
        sink,
        head_dim_v,
        scale,
        causal,
        True,
        out,
        lse,
    )
    if not batch_invariant:
        _check_schedule(q, k_cache, causal, schedule, num_splits)
    failure = errors.from_native(error)
    if not isinstance(failure, errors.UnsupportedError):
        raise failure from None
    wanted = problem.DenseDecodeProblem.of(q, k_cache, head_dim_v, scale)
    if backends.override is not None:
        backends.select(wanted)  # where it knows the reasons, it raises them
        raise failure from None
    chosen = backends.select(wanted, behind=backends.CUDA)
    if chosen is backends.REFERENCE:
        reference.warn_once(backends.CUDA.why_not(wanted) or str(failure))
    return _dense_decode(chosen.operators, *arguments)


def _check_schedule(q: Tensor, k_cache: Tensor, causal: bool, schedule: Any, num_splits: Any) -> None:
    """Check a schedule, in either form, beside arguments that are right. An object without a plan is right."""
    if isinstance(schedule, FlashMLASchedMeta):
        meta = schedule
        if meta.tile_scheduler_metadata is None or meta.num_splits is None:
            return
        if meta.have_initialized:
            meta.check_dense(q.shape, k_cache.shape, causal)
        problem.check_schedule(q, meta.tile_scheduler_metadata, meta.num_splits)
    else:
        problem.check_schedule(q, schedule, num_splits)


def _check_unusual(
    k_cache: Any,
    causal: bool,
    is_fp8_kvcache: bool,
    indices: Any,
    extra_k_cache: Any,
    extra_indices_in_kvcache: Any,
    topk_length: Any,
    extra_topk_length: Any,
    kv_format: Any,
    descale_q: Any,
    descale_k: Any,
) -> None:
    """Check the arguments that a dense call over a bf16 or fp16 cache leaves out."""
    if indices is not None:
        problem.check_sparse_call(
            causal=causal,
            extra_k_cache=extra_k_cache,
            extra_indices_in_kvcache=extra_indices_in_kvcache,
            extra_topk_length=extra_topk_length,
        )
    problem.check_dense_call(
        k_cache,
        is_fp8_kvcache=is_fp8_kvcache,
        kv_format=kv_format,
        descale_q=descale_q,
        descale_k=descale_k,
        sparse_only={
            "extra_k_cache": extra_k_cache,
            "extra_indices_in_kvcache": extra_indices_in_kvcache,
            "topk_length": topk_length,
            "extra_topk_length": extra_topk_length,
        },
    )
