"""`flash_mla_with_kvcache`: attention of new queries over a paged cache."""

from typing import Any

import torch
from torch import Tensor

from flash_mla import arguments, backends, decode_calls, errors, problem, problem_sparse
from flash_mla.decode_calls import DenseFP8Call, SparseCall
from flash_mla.kv_format import BYTE_DTYPES, KVFormat
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
    `< cache_seqlens[i] - (s_q - 1 - j)` for query j. Sparse: every query sees the cache rows that its indices name, of
    both caches together, each as often as it is named. `lse = ln(sum_i exp(scale * q . k_i))` and
    `out = sum_i exp(scale * q . k_i - lse) v_i * exp(lse) / (exp(lse) + exp(sink))`. A query without keys gets out 0
    and lse +inf. Not differentiable: the results never require a gradient.

    A value of an FP8 or FP4 format is `stored * scale`, computed in float32 and rounded once, to bfloat16. Bytes that
    no length and no valid index reaches never matter.

    Args:
        q: `[b, s_q, h_q, d_qk]`, last dimension contiguous; d_qk 576 or 512. bfloat16; in a dense call also float16, or
            float8_e4m3fn over an FP8 cache.
        k_cache: last dimension contiguous. `[num_blocks, page_block_size, h_kv, d_qk]` of q's dtype, `h_q % h_kv == 0`
            (h_kv = 1 in a sparse call); a `KVFormat`, `[num_blocks, page_block_size, 1, bytes per token]`,
            float8_e4m3fn, int8 or uint8, strides multiples of 16 bytes; in a dense call also float8_e4m3fn
            `[num_blocks, page_block_size, h_kv, d_qk]` with descale_k.
        block_table: int32 `[b, max_blocks]`; entries past the length are never used. Ignored in a sparse call.
        cache_seqlens: int32 `[b]`, keys per request, 0 included. Ignored in a sparse call.
        head_dim_v: 512.
        tile_scheduler_metadata: what `get_mla_metadata` returned first (planned by the first call, reused by later
            ones), or the int32 `[num_sm_parts, 8]` tensor of `get_mla_decoding_metadata`. Not read, and may be None,
            with `enable_batch_invariant`.
        num_splits: int32 `[b + 1]` beside such a tensor, else None.
        softmax_scale: factor on the scores; None stands for `d_qk ** -0.5`.
        causal: mask aligned to the bottom right; False in a sparse call.
        is_fp8_kvcache: the cache is one of bytes. Its dtype tells as well, but later, so that the call costs more.
        indices: int32 `[b, s_q, topk]`, sparse decode: `page_index * page_block_size + offset`. Whatever is no slot of
            the cache selects nothing, wherever it stands.
        attn_sink: float32 `[h_q]`, natural-log units, not multiplied by the scale; not part of lse.
        extra_k_cache: a second cache for a sparse call, of the same format (or V41_FP4 beside V41) and any page size.
        extra_indices_in_kvcache: int32 `[b, s_q, extra_topk]`, indices into it.
        topk_length: int32 `[b]` or `[b, s_q]`: how many leading indices count, cut to 0 .. topk; None for all. Those
            behind are never used.
        extra_topk_length: the same for the second cache.
        kv_format: format of `k_cache`; by default what d_qk and the bytes per token say (528 bytes mean V41).
        enable_batch_invariant: the bits of a request (in a sparse call, of a query) do not depend on the rest of the
            batch, nor on indices that select nothing.
        descale_q: float32, one number, positive: what an FP8 q is multiplied by.
        descale_k: float32, one number, positive: what the values of an FP8 cache without a format are multiplied by.
        out: where to write out: shape and dtype of the result, last dimension contiguous.
        lse: where to write lse.

    Returns:
        out `[b, s_q, h_q, 512]` in q's dtype (bfloat16 for an FP8 q) and lse float32 `[b, h_q, s_q]`, natural log.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came; also when the call does not fit the
            shape that the metadata was planned for.
        UnsupportedError: valid, but not served by this device or build; lists each candidate and its reason.
    """
    call = (
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
        result = _decode_unusual(
            call,
            is_fp8_kvcache,
            indices,
            (extra_k_cache, extra_indices_in_kvcache, extra_topk_length),
            topk_length,
            kv_format,
            descale_q,
            descale_k,
        )
        if result is not None:
            return result
    # No check stands before the operator: it makes its own, in C++. Only when it refuses do Python's find the words.
    try:
        return _dense_decode(backends.active, *call)
    except Exception as error:
        return _explain_or_reroute(error, *call)


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


def _explain_or_reroute(error: Exception, *call: Any) -> tuple[Tensor, Tensor]:
    """After a refused call: raise the error that names the argument; or let the next backend serve what was declined.

    Only an operator that declined before any launch gets here with `UnsupportedError`. Every other failure is raised.
    """
    q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, num_splits, scale, causal, sink, *rest = call
    batch_invariant, out, lse = rest
    if isinstance(k_cache, Tensor) and k_cache.dtype in BYTE_DTYPES:  # nothing else told that the cache is FP8
        arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
        known = problem.dense_fp8_format(k_cache, q.shape[-1], None)
        scale = problem.default_softmax_scale(q.shape[-1]) if scale is None else scale
        common = (q, k_cache, schedule, num_splits, sink, head_dim_v, scale, batch_invariant, out, lse)
        return decode_calls.run(DenseFP8Call(*common, block_table, cache_seqlens, causal, None, None, known))
    if scale is None and isinstance(q, Tensor) and q.dim() > 0:
        scale = problem.default_softmax_scale(q.shape[-1])
    arguments.check_flag("enable_batch_invariant", batch_invariant)
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
    return _dense_decode(backends.after(failure, wanted).operators, *call)


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


def _decode_unusual(
    call: tuple[Any, ...],
    is_fp8_kvcache: Any,
    indices: Any,
    extra: tuple[Any, Any, Any],
    topk_length: Any,
    kv_format: Any,
    descale_q: Any,
    descale_k: Any,
) -> tuple[Tensor, Tensor] | None:
    """A call with arguments that a plain dense call leaves out; None when it is a plain one all the same.

    `extra`: the second cache, the indices into it, and their length.
    """
    q, k_cache, block_table, cache_seqlens, head_dim_v, schedule, num_splits, softmax_scale, *rest = call
    causal, attn_sink, batch_invariant, out, lse = rest
    if softmax_scale is None and isinstance(q, Tensor) and q.dim() > 0:
        softmax_scale = problem.default_softmax_scale(q.shape[-1])
    common = (q, k_cache, schedule, num_splits, attn_sink, head_dim_v, softmax_scale, batch_invariant, out, lse)
    if indices is not None:
        problem_sparse.check_sparse_call(
            k_cache, causal=causal, is_fp8_kvcache=is_fp8_kvcache, descale_q=descale_q, descale_k=descale_k
        )
        problem_sparse.check_extra_arguments(*extra)
        arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
        formats = problem_sparse.formats_of_call("k_cache", k_cache, extra[0], q.shape[-1], kv_format)
        return decode_calls.run(SparseCall(*common, indices, topk_length, *extra, *formats))
    problem.check_dense_call(
        k_cache,
        is_fp8_kvcache=is_fp8_kvcache,
        kv_format=kv_format,
        descale_q=descale_q,
        descale_k=descale_k,
        sparse_only={
            "extra_k_cache": extra[0],
            "extra_indices_in_kvcache": extra[1],
            "topk_length": topk_length,
            "extra_topk_length": extra[2],
        },
    )
    if not isinstance(k_cache, Tensor) or k_cache.dtype not in BYTE_DTYPES:
        return None
    arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    known = problem.dense_fp8_format(k_cache, q.shape[-1], kv_format)
    return decode_calls.run(DenseFP8Call(*common, block_table, cache_seqlens, causal, descale_q, descale_k, known))
