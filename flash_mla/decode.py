"""`flash_mla_with_kvcache`: attention of new queries over a paged cache."""

from typing import Any

from torch import Tensor

from flash_mla import arguments, backends, decode_calls, problem, problem_sparse
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
    try:
        q_shape = q.shape
        if softmax_scale is None:
            softmax_scale = q_shape[-1] ** -0.5
    except (AttributeError, IndexError):
        arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
        raise
    operation: decode_calls.Operation
    keys: decode_calls.Arguments
    options: decode_calls.Arguments
    if indices is not None:
        extra = (extra_k_cache, extra_indices_in_kvcache, extra_topk_length)
        flags = (
            # Bools by identity: 0 and 1 are equal to them, and no flags.
            causal is False,
            is_fp8_kvcache is True,
            is_fp8_kvcache is False,
            descale_q is None,
            descale_k is None,
            extra_indices_in_kvcache is None,
            extra_topk_length is None,
        )
        names = problem_sparse.format_names(
            q_shape,
            k_cache,
            extra_k_cache,
            kv_format,
            flags,
            _sparse_formats,
            q,
            k_cache,
            extra,
            kv_format,
            causal,
            is_fp8_kvcache,
            descale_q,
            descale_k,
        )
        operation, keys = decode_calls.SPARSE, (q, k_cache, indices, topk_length, *extra)
        options = (attn_sink, *names, head_dim_v, softmax_scale, enable_batch_invariant)
    else:
        operation, keys = decode_calls.DENSE, (q, k_cache, block_table, cache_seqlens)
        options = (attn_sink, head_dim_v, softmax_scale, causal, enable_batch_invariant)
        if (
            is_fp8_kvcache
            or extra_k_cache is not None
            or extra_indices_in_kvcache is not None
            or topk_length is not None
            or extra_topk_length is not None
            or kv_format is not None
            or descale_q is not None
            or descale_k is not None
        ):
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
            if isinstance(k_cache, Tensor) and k_cache.dtype in BYTE_DTYPES:
                operation = decode_calls.DENSE_FP8
                options = (*options, descale_q, descale_k, decode_calls.dense_fp8_name(q, k_cache, kv_format))
    metadata, batch_invariant = tile_scheduler_metadata, enable_batch_invariant
    # No check stands before the operator: it makes its own, in C++. Only when it refuses do Python's find the words.
    try:
        return decode_calls.run(
            backends.active, operation, q_shape, keys, options, metadata, num_splits, batch_invariant, out, lse
        )
    except Exception as error:
        return decode_calls.explain_or_reroute(
            error, operation, q_shape, keys, options, metadata, num_splits, batch_invariant, out, lse
        )


def _sparse_formats(
    q: Any,
    k_cache: Any,
    extra: tuple[Any, Any, Any],
    kv_format: Any,
    causal: Any,
    is_fp8_kvcache: Any,
    descale_q: Any,
    descale_k: Any,
) -> tuple[KVFormat, KVFormat | None]:
    """The formats of a sparse call, after the checks of it that the operator does not make.

    `extra`: the second cache, the indices into it, and their length.
    """
    problem_sparse.check_sparse_call(
        k_cache, causal=causal, is_fp8_kvcache=is_fp8_kvcache, descale_q=descale_q, descale_k=descale_k
    )
    problem_sparse.check_extra_arguments(*extra)
    arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    return problem_sparse.resolve_formats("k_cache", k_cache, extra[0], q.shape[-1], kv_format)
