"""Sparse attention, decode and prefill: what the choice of a kernel depends on, and the checks of the operators."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_mla import arguments, kv_format, problem
from flash_mla.errors import wanted
from flash_mla.kv_format import KVFormat

LSE_BASES = ("e", "2")


@dataclass(frozen=True)
class SparseDecodeProblem:
    """What the choice of a sparse decode kernel depends on."""

    op: ClassVar[str] = "sparse_decode"

    device_type: str
    compute_capability: int | None
    kv_format: KVFormat
    extra_kv_format: KVFormat | None
    """Of the second cache; None without one."""
    b: int
    s_q: int
    h_q: int
    d_qk: int
    page_block_size: int
    extra_page_block_size: int | None
    topk: int
    extra_topk: int
    """0 without a second cache."""
    d_v: int
    softmax_scale: float

    @staticmethod
    def of(
        q: Tensor,
        k_cache: Tensor,
        indices: Tensor,
        extra_k_cache: Tensor | None = None,
        extra_indices_in_kvcache: Tensor | None = None,
        kv_format: KVFormat | str | None = None,
        head_dim_v: int = problem.HEAD_DIM_V,
        softmax_scale: float | None = None,
    ) -> "SparseDecodeProblem":
        """The problem of a sparse `flash_mla_with_kvcache` call with these tensors."""
        b, s_q, h_q, d_qk = q.shape
        known, extra = resolve_formats("k_cache", k_cache, extra_k_cache, d_qk, kv_format)
        return SparseDecodeProblem(
            *problem.device_of(q),
            known,
            extra,
            b,
            s_q,
            h_q,
            d_qk,
            k_cache.shape[1],
            None if extra_k_cache is None else extra_k_cache.shape[1],
            indices.shape[-1],
            0 if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1],
            head_dim_v,
            problem.default_softmax_scale(d_qk) if softmax_scale is None else softmax_scale,
        )


@dataclass(frozen=True)
class SparsePrefillProblem:
    """What the choice of a sparse prefill kernel depends on."""

    op: ClassVar[str] = "sparse_prefill"

    device_type: str
    compute_capability: int | None
    kv_format: KVFormat
    extra_kv_format: KVFormat | None
    s_q: int
    h_q: int
    d_qk: int
    d_v: int
    topk: int
    extra_topk: int
    sm_scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        kv: Tensor,
        indices: Tensor,
        d_v: int = problem.HEAD_DIM_V,
        extra_k_cache: Tensor | None = None,
        extra_indices_in_kvcache: Tensor | None = None,
        kv_format: KVFormat | str | None = None,
        sm_scale: float | None = None,
    ) -> "SparsePrefillProblem":
        """The problem of a `flash_mla_sparse_fwd` call with these tensors."""
        s_q, h_q, d_qk = q.shape
        known, extra = resolve_formats("kv", as_cache(kv), as_cache(extra_k_cache), d_qk, kv_format)
        extra_topk = 0 if extra_indices_in_kvcache is None else extra_indices_in_kvcache.shape[-1]
        return cls(
            *problem.device_of(q),
            known,
            extra,
            s_q,
            h_q,
            d_qk,
            d_v,
            indices.shape[-1],
            extra_topk,
            problem.default_softmax_scale(d_qk) if sm_scale is None else sm_scale,
        )


@dataclass(frozen=True)
class SparsePrefillBackwardProblem(SparsePrefillProblem):
    """The same for the gradients of q, kv and the sink."""

    op: ClassVar[str] = "sparse_prefill_backward"


def as_cache(kv: Any) -> Any:
    """Rows `[s_kv, h_kv, d_qk]` as a cache of pages of one row; anything else as it is."""
    return kv.unsqueeze(1) if isinstance(kv, Tensor) and kv.dim() == 3 else kv


def resolve_formats(
    name: str, cache: Any, extra: Any, d_qk: int, named: KVFormat | str | None
) -> tuple[KVFormat, KVFormat | None]:
    """The formats of a cache and of the second cache beside it. `named` is that of the first.

    The second is of the same format, or V41_FP4 beside V41.

    Raises:
        ValueError, TypeError: a cache is of no format, of another one than was named, or they do not go together.
    """
    known = kv_format.resolve(name, cache, d_qk, named)
    if known is KVFormat.V41_FP4:
        raise ValueError(wanted(name, "another format (V41_FP4 is for the extra cache, beside V41)", known.value))
    if extra is None:
        return known, None
    arguments.check_tensor("extra_k_cache", extra, 4, "[num_blocks, page_block_size, 1, d_qk or bytes per token]")
    fp4 = KVFormat.V41_FP4
    if known is KVFormat.V41 and extra.shape[-1] == fp4.layout.bytes_per_token:
        return known, kv_format.resolve("extra_k_cache", extra, d_qk, fp4)
    return known, kv_format.resolve("extra_k_cache", extra, d_qk, known)


_names: dict[Any, tuple[str, str | None]] = {}


def format_names(
    q_shape: Sequence[int],
    cache: Any,
    extra: Any,
    named: Any,
    flags: tuple[bool, ...],
    resolve: Callable[..., tuple[KVFormat, KVFormat | None]],
    *arguments: Any,
) -> tuple[str, str | None]:
    """The names of what `resolve(*arguments)` says, remembered: each time it would take longer than all else.

    Shapes and caches count by number of dimensions, last dimension and dtype. `flags`: whatever else may make `resolve`
    raise an error.
    """
    facts = known = None
    if not torch.compiler.is_compiling():
        try:
            shape = cache.shape
            second = None if extra is None else (extra.dtype, extra.dim(), extra.shape[-1])
            facts = (cache.dtype, len(shape), shape[-1], len(q_shape), q_shape[-1], named, flags, second)
            known = _names.get(facts)
        except (AttributeError, IndexError, TypeError):  # whatever is wrong, `resolve` says it in words
            facts = None
    if known is None:
        first, other = resolve(*arguments)
        known = (first.value, None if other is None else other.value)
        if facts is not None:
            _names[facts] = known
    return known


def check_extra_arguments(extra_k_cache: Any, extra_indices_in_kvcache: Any, extra_topk_length: Any) -> None:
    """Check that the arguments of a second cache come together."""
    if extra_k_cache is None:
        if extra_indices_in_kvcache is None and extra_topk_length is None:
            return
        dependents = {"extra_indices_in_kvcache": extra_indices_in_kvcache, "extra_topk_length": extra_topk_length}
        for name, value in dependents.items():
            if value is not None:
                raise ValueError(wanted(name, "None without extra_k_cache", type(value).__name__))
    elif extra_indices_in_kvcache is None:
        raise ValueError(wanted("extra_indices_in_kvcache", "int32 [b, s_q, extra_topk] with extra_k_cache", None))


def check_sparse_call(k_cache: Any, *, causal: Any, is_fp8_kvcache: Any, descale_q: Any, descale_k: Any) -> None:
    """Check the arguments of a sparse `flash_mla_with_kvcache` call that the operator does not have."""
    arguments.check_flag("causal", causal)
    arguments.check_flag("is_fp8_kvcache", is_fp8_kvcache)
    if causal:
        raise ValueError(wanted("causal", "False with indices (the indices are the mask)", causal))
    if is_fp8_kvcache and isinstance(k_cache, Tensor) and k_cache.dtype == torch.bfloat16:
        raise ValueError(wanted("is_fp8_kvcache", f"False, since k_cache is {k_cache.dtype}", True))
    if descale_q is not None or descale_k is not None:
        name, value = ("descale_k", descale_k) if descale_q is None else ("descale_q", descale_q)
        raise ValueError(wanted(name, "None with indices (the formats hold their scales)", type(value).__name__))


# ---- The operators.


def check_sparse_decode(
    q: Any,
    k_cache: Any,
    indices: Any,
    topk_length: Any,
    extra_k_cache: Any,
    extra_indices: Any,
    extra_topk_length: Any,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    attn_sink: Any,
    kv_format: Any,
    extra_kv_format: Any,
    head_dim_v: Any,
    softmax_scale: Any,
    batch_invariant: Any,
    out: Any = None,
    lse: Any = None,
) -> None:
    """Check the arguments of `torch.ops.flash_mla.sparse_decode` (and of its `_out` form).

    Raises:
        ValueError, TypeError: naming the wrong argument.
    """
    _check_query(q, 4, "[b, s_q, h_q, d_qk]")
    tokens = ("[b, s_q, topk]", (q.shape[0], q.shape[1]))
    check_extra_arguments(extra_k_cache, extra_indices, extra_topk_length)
    _check_selection("k_cache", q, k_cache, kv_format)
    _check_indices("indices", q, indices, *tokens)
    _check_topk_length("topk_length", q, topk_length)
    if extra_k_cache is not None:
        _check_selection("extra_k_cache", q, extra_k_cache, extra_kv_format)
        _check_indices("extra_indices_in_kvcache", q, extra_indices, *tokens)
        _check_topk_length("extra_topk_length", q, extra_topk_length)
    arguments.check_int("head_dim_v", head_dim_v)
    if head_dim_v != problem.HEAD_DIM_V:
        raise ValueError(wanted("head_dim_v", str(problem.HEAD_DIM_V), head_dim_v))
    arguments.check_scale(softmax_scale)
    arguments.check_flag("enable_batch_invariant", batch_invariant)
    if not batch_invariant:
        problem.check_schedule(q, tile_scheduler_metadata, num_splits)
    arguments.check_sink(attn_sink, q.shape[2], q.device)
    problem.check_outputs(q, head_dim_v, out, lse)


def check_sparse_prefill(
    q: Any,
    kv: Any,
    indices: Any,
    topk_length: Any,
    extra_k_cache: Any,
    extra_indices: Any,
    extra_topk_length: Any,
    attn_sink: Any,
    kv_format: Any,
    extra_kv_format: Any,
    d_v: Any,
    sm_scale: Any,
    lse_base: Any,
    deterministic: Any,
    out: Any = None,
    max_logits: Any = None,
    lse: Any = None,
) -> None:
    """Check the arguments of `torch.ops.flash_mla.sparse_prefill` (and of its `_out` form). kv is rows or a cache.

    Raises:
        ValueError, TypeError: naming the wrong argument.
    """
    _check_query(q, 3, "[s_q, h_q, d_qk]")
    s_q, h_q, d_qk = q.shape
    tokens = ("[s_q, h_kv = 1, topk]", (s_q, 1))
    check_extra_arguments(extra_k_cache, extra_indices, extra_topk_length)
    _check_selection("kv", q, as_cache(kv), kv_format)
    _check_indices("indices", q, indices, *tokens)
    _check_prefill_length("topk_length", q, topk_length)
    if extra_k_cache is not None:
        _check_selection("extra_k_cache", q, as_cache(extra_k_cache), extra_kv_format)
        _check_indices("extra_indices_in_kvcache", q, extra_indices, *tokens)
        _check_prefill_length("extra_topk_length", q, extra_topk_length)
    arguments.check_int("d_v", d_v, least=1)
    if d_v > d_qk:
        raise ValueError(wanted("d_v", f"at most d_qk = {d_qk}", d_v))
    arguments.check_scale(sm_scale, "sm_scale")
    arguments.check_one_of("return_lse_base", lse_base, LSE_BASES)
    arguments.check_flag("deterministic", deterministic)
    arguments.check_sink(attn_sink, h_q, q.device)
    if out is not None:
        arguments.check_tensor("out", out, 3, "[s_q, h_q, d_v]")
        arguments.check_dtype("out", out, (q.dtype,))
        arguments.check_shape("out", out, "[s_q, h_q, d_v]", (s_q, h_q, d_v))
        arguments.check_device("out", out, q.device)
        arguments.check_last_stride("out", out)
    for name, rows in {"max_logits": max_logits, "lse": lse}.items():
        if rows is not None:
            arguments.check_tensor(name, rows, 2, "[s_q, h_q]")
            arguments.check_dtype(name, rows, (torch.float32,))
            arguments.check_shape(name, rows, "[s_q, h_q]", (s_q, h_q))
            arguments.check_device(name, rows, q.device)


def check_sparse_plan(
    requests: Any, topk_length: Any, extra_topk_length: Any, s_q: Any, h_q: Any, topk: Any, extra_topk: Any
) -> None:
    """Check the arguments of `torch.ops.flash_mla.plan_sparse_decode`."""
    if not isinstance(requests, Tensor) or requests.dim() < 1:
        raise TypeError(wanted("requests", "a tensor with b rows", type(requests).__name__))
    for name, value, least in (("s_q", s_q, 1), ("h_q", h_q, 1), ("topk", topk, 1), ("extra_topk", extra_topk, 0)):
        arguments.check_int(name, value, least)
    for name, length in {"topk_length": topk_length, "extra_topk_length": extra_topk_length}.items():
        _check_lengths(name, length, requests.shape[0], s_q, requests.device)


def _check_query(q: Any, dims: int, shape: str) -> None:
    arguments.check_tensor("q", q, dims, shape)
    arguments.check_dtype("q", q, (torch.bfloat16,))
    if q.shape[-1] not in problem.HEAD_DIMS_QK:
        raise ValueError(wanted("q", "d_qk (last dimension) 576 or 512", q.shape[-1]))
    if q.shape[-2] < 1 or (dims == 4 and q.shape[1] < 1):
        raise ValueError(wanted("q", "s_q and h_q of at least 1", f"shape {list(q.shape)}"))
    arguments.check_last_stride("q", q)


def _check_selection(name: str, q: Tensor, cache: Any, format: Any) -> None:
    known = kv_format.parse(format, "kv_format" if name != "extra_k_cache" else "extra_kv_format")
    kv_format.check_cache(name, cache, known, q.shape[-1])
    d_qk = known.d_qk_of(cache)
    if d_qk != q.shape[-1]:
        raise ValueError(wanted(name, f"a format of d_qk = {q.shape[-1]}, like q", f"{known.value} of {d_qk}"))
    arguments.check_device(name, cache, q.device)


def _check_indices(name: str, q: Tensor, indices: Any, meaning: str, tokens: tuple[int, int]) -> None:
    arguments.check_tensor(name, indices, 3, meaning)
    arguments.check_dtype(name, indices, (torch.int32,))
    if tuple(indices.shape[:2]) != tokens or indices.shape[2] < 1:
        wished = f"shape {meaning} with {list(tokens)} first and at least 1 behind"
        raise ValueError(wanted(name, wished, list(indices.shape)))
    arguments.check_last_stride(name, indices)
    arguments.check_device(name, indices, q.device)


def _check_topk_length(name: str, q: Tensor, length: Any) -> None:
    _check_lengths(name, length, q.shape[0], q.shape[1], q.device)


def _check_lengths(name: str, length: Any, b: int, s_q: int, device: torch.device) -> None:
    if length is None:
        return
    if not isinstance(length, Tensor):
        raise TypeError(wanted(name, "a tensor [b] or [b, s_q]", type(length).__name__))
    arguments.check_dtype(name, length, (torch.int32,))
    if tuple(length.shape) not in ((b,), (b, s_q)):
        raise ValueError(wanted(name, f"shape [b] = {[b]} or [b, s_q] = {[b, s_q]}", list(length.shape)))
    arguments.check_device(name, length, device)


def _check_prefill_length(name: str, q: Tensor, length: Any) -> None:
    if length is None:
        return
    arguments.check_tensor(name, length, 1, "[s_q]")
    arguments.check_dtype(name, length, (torch.int32,))
    arguments.check_shape(name, length, "[s_q]", (q.shape[0],))
    arguments.check_device(name, length, q.device)
