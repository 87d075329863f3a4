"""What a call asks for, and whether it may: the problem that kernels are chosen by, and every check of an argument.

The native operators check their arguments themselves, for memory safety and speed. These checks run before the
reference backend, in the fake functions, and whenever a native operator refused a call, so that an error reads the
same on every
backend: it names the argument, what was wanted and what came.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla.errors import not_built_yet, wanted

BLOCK_KEYS = 64
"""Keys per block of a schedule."""

ROW_FIELDS = 8
"""int32 fields per row of a schedule."""

REFERENCE_PARTS = 8
"""Rows that the PyTorch planner makes; the reference backend does not depend on the number."""

MAX_PARTS = 65535
"""Rows that a schedule may have."""

MAX_MERGE_PARTS = 16
"""Parts that `merge_attention_states` joins in one call."""

HEAD_DIM_V = 512
HEAD_DIMS_QK = (512, 576)
HALF_DTYPES = (torch.bfloat16, torch.float16)
FP8_CACHE_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)


@dataclass(frozen=True)
class DenseDecodeProblem:
    """What the choice of a dense decode kernel depends on."""

    device_type: str
    """"cuda", "cpu", ..."""
    compute_capability: int | None
    """90 for 9.0; None away from CUDA."""
    dtype: torch.dtype
    """Of q and of the cache."""
    b: int
    s_q: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    page_block_size: int
    softmax_scale: float

    @staticmethod
    def of(
        q: Tensor, k_cache: Tensor, head_dim_v: int = HEAD_DIM_V, softmax_scale: float | None = None
    ) -> "DenseDecodeProblem":
        """The problem of a call with these tensors (`q` `[b, s_q, h_q, d_qk]`, `k_cache` `[num_blocks, page, h_kv,
        d_qk]`).
        """
        b, s_q, h_q, d_qk = q.shape
        _, page, h_kv, _ = k_cache.shape
        capability = None
        if q.device.type == "cuda":
            major, minor = torch.cuda.get_device_capability(q.device)
            capability = 10 * major + minor
        scale = default_softmax_scale(d_qk) if softmax_scale is None else softmax_scale
        return DenseDecodeProblem(q.device.type, capability, q.dtype, b, s_q, h_q, h_kv, d_qk, head_dim_v, page, scale)


def default_softmax_scale(d_qk: int) -> float:
    """`1 / sqrt(d_qk)`."""
    return float(d_qk**-0.5)


# ---- The vocabulary of checks.


def _check_tensor(name: str, value: object, dims: int, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(wanted(name, f"a tensor {shape}", "None" if value is None else type(value).__name__))
    if value.dim() != dims:
        raise ValueError(wanted(name, f"{dims} dimensions {shape}", f"shape {list(value.shape)}"))


def _check_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if value.dtype not in dtypes:
        raise TypeError(wanted(name, " or ".join(str(dtype) for dtype in dtypes), value.dtype))


def _check_shape(name: str, value: Tensor, meaning: str, shape: tuple[int, ...]) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(wanted(name, f"shape {meaning} = {list(shape)}", list(value.shape)))


def _check_device(name: str, value: Tensor, device: torch.device) -> None:
    if value.device != device:
        raise ValueError(wanted(name, f"a tensor on {device}, like q", value.device))


def _check_last_stride(name: str, value: Tensor) -> None:
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(wanted(name, "a contiguous last dimension (stride 1)", f"stride {value.stride(-1)}"))


def _check_contiguous(name: str, value: Tensor) -> None:
    if not value.is_contiguous():
        raise ValueError(wanted(name, "a contiguous tensor", f"strides {list(value.stride())}"))


def _check_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(wanted(name, "an int", type(value).__name__))


def check_flag(name: str, value: object) -> None:
    """Check a bool."""
    if not isinstance(value, bool):
        raise TypeError(wanted(name, "a bool", type(value).__name__))


def _check_scale(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(wanted("softmax_scale", "a finite number", type(value).__name__))
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(wanted("softmax_scale", "a finite number", value))


# ---- Dense decode, as the operators see it.


def check_dense_decode(
    q: Any,
    k_cache: Any,
    block_table: Any,
    cache_seqlens: Any,
    tile_scheduler_metadata: Any,
    num_splits: Any,
    attn_sink: Any,
    head_dim_v: Any,
    softmax_scale: Any,
    causal: Any,
    batch_invariant: Any,
    out: Any = None,
    lse: Any = None,
) -> None:
    """Check the arguments of `torch.ops.flash_mla.dense_decode` (and of its `_out` form).

    Raises:
        ValueError, TypeError: naming the wrong argument.
        UnsupportedError: an FP8 query or cache.
    """
    _check_query_and_cache(q, k_cache)
    _check_int("head_dim_v", head_dim_v)
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(wanted("head_dim_v", str(HEAD_DIM_V), head_dim_v))
    _check_scale(softmax_scale)
    check_flag("causal", causal)
    check_flag("enable_batch_invariant", batch_invariant)
    _check_paging(q, block_table, cache_seqlens)
    if not batch_invariant:
        check_schedule(q, tile_scheduler_metadata, num_splits)
    b, s_q, h_q, _ = q.shape
    if attn_sink is not None:
        _check_tensor("attn_sink", attn_sink, 1, "[h_q]")
        _check_dtype("attn_sink", attn_sink, (torch.float32,))
        _check_shape("attn_sink", attn_sink, "[h_q]", (h_q,))
        _check_device("attn_sink", attn_sink, q.device)
        _check_contiguous("attn_sink", attn_sink)
    if out is not None:
        _check_tensor("out", out, 4, "[b, s_q, h_q, head_dim_v]")
        _check_dtype("out", out, (q.dtype,))
        _check_shape("out", out, "[b, s_q, h_q, head_dim_v]", (b, s_q, h_q, head_dim_v))
        _check_device("out", out, q.device)
        _check_last_stride("out", out)
    if lse is not None:
        _check_tensor("lse", lse, 3, "[b, h_q, s_q]")
        _check_dtype("lse", lse, (torch.float32,))
        _check_shape("lse", lse, "[b, h_q, s_q]", (b, h_q, s_q))
        _check_device("lse", lse, q.device)


def _check_query_and_cache(q: Any, k_cache: Any) -> None:
    _check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    _check_tensor("k_cache", k_cache, 4, "[num_blocks, page_block_size, h_kv, d_qk]")
    if q.dtype == torch.float8_e4m3fn:
        raise not_built_yet("flash_mla_with_kvcache with an FP8 q")
    _check_dtype("q", q, HALF_DTYPES)
    if k_cache.dtype in FP8_CACHE_DTYPES:
        raise not_built_yet(f"dense flash_mla_with_kvcache with an FP8 k_cache ({k_cache.dtype})")
    if k_cache.dtype != q.dtype:
        raise TypeError(wanted("k_cache", f"{q.dtype}, like q", k_cache.dtype))
    _check_device("k_cache", k_cache, q.device)
    _, s_q, h_q, d_qk = q.shape
    num_blocks, page, h_kv, d_k = k_cache.shape
    if d_qk not in HEAD_DIMS_QK:
        raise ValueError(wanted("q", "d_qk (last dimension) 576 or 512", d_qk))
    if d_k != d_qk:
        raise ValueError(wanted("k_cache", f"a last dimension of d_qk = {d_qk}, like q", d_k))
    if s_q < 1 or h_q < 1:
        raise ValueError(wanted("q", "s_q and h_q of at least 1", f"shape {list(q.shape)}"))
    if num_blocks < 1 or page < 1 or h_kv < 1:
        raise ValueError(
            wanted("k_cache", "num_blocks, page_block_size and h_kv of at least 1", f"shape {list(k_cache.shape)}")
        )
    if h_q % h_kv != 0:
        raise ValueError(wanted("q", f"h_q that is a multiple of h_kv = {h_kv}", f"h_q = {h_q}"))
    _check_last_stride("q", q)
    _check_last_stride("k_cache", k_cache)


def _check_paging(q: Tensor, block_table: Any, cache_seqlens: Any) -> None:
    b = q.shape[0]
    _check_tensor("block_table", block_table, 2, "[b, max_blocks]")
    _check_dtype("block_table", block_table, (torch.int32,))
    _check_device("block_table", block_table, q.device)
    if block_table.shape[0] != b:
        raise ValueError(wanted("block_table", f"[b, max_blocks] with b = {b}", f"shape {list(block_table.shape)}"))
    _check_last_stride("block_table", block_table)
    check_lengths("cache_seqlens", cache_seqlens)
    _check_shape("cache_seqlens", cache_seqlens, "[b]", (b,))
    _check_device("cache_seqlens", cache_seqlens, q.device)


def check_lengths(name: str, lengths: Any) -> None:
    """Check a tensor of lengths: int32 `[b]`, contiguous."""
    _check_tensor(name, lengths, 1, "[b]")
    _check_dtype(name, lengths, (torch.int32,))
    _check_contiguous(name, lengths)


def check_schedule(q: Tensor, rows: Any, num_splits: Any) -> None:
    """Check the tensors of a schedule for a call with this q."""
    b = q.shape[0]
    _check_tensor("tile_scheduler_metadata", rows, 2, "[num_sm_parts, 8] or a FlashMLASchedMeta")
    _check_dtype("tile_scheduler_metadata", rows, (torch.int32,))
    if not 1 <= rows.shape[0] <= MAX_PARTS or rows.shape[1] != ROW_FIELDS:
        meaning = f"shape [num_sm_parts, 8] with 1 to {MAX_PARTS} rows"
        raise ValueError(wanted("tile_scheduler_metadata", meaning, list(rows.shape)))
    _check_device("tile_scheduler_metadata", rows, q.device)
    _check_contiguous("tile_scheduler_metadata", rows)
    _check_tensor("num_splits", num_splits, 1, "[b + 1]")
    _check_dtype("num_splits", num_splits, (torch.int32,))
    _check_shape("num_splits", num_splits, "[b + 1]", (b + 1,))
    _check_device("num_splits", num_splits, q.device)
    _check_contiguous("num_splits", num_splits)


# ---- flash_mla_with_kvcache: the arguments that the dense operators do not have.


def check_dense_call(
    k_cache: Any,
    *,
    is_fp8_kvcache: Any,
    kv_format: Any,
    descale_q: Any,
    descale_k: Any,
    sparse_only: dict[str, Any],
) -> None:
    """Check what a dense call must leave out. `sparse_only`: arguments that belong to sparse decode, by name."""
    for name, value in sparse_only.items():
        if value is not None:
            raise ValueError(wanted(name, "None in a dense call (indices is None)", type(value).__name__))
    check_flag("is_fp8_kvcache", is_fp8_kvcache)
    if not isinstance(k_cache, Tensor) or k_cache.dtype in FP8_CACHE_DTYPES:
        return
    if is_fp8_kvcache:
        raise ValueError(wanted("is_fp8_kvcache", f"False, since k_cache is {k_cache.dtype}", True))
    for name, value in {"kv_format": kv_format, "descale_q": descale_q, "descale_k": descale_k}.items():
        if value is not None:
            raise ValueError(wanted(name, f"None with a k_cache of {k_cache.dtype}", type(value).__name__))


def check_sparse_call(
    *,
    causal: bool,
    extra_k_cache: Any,
    extra_indices_in_kvcache: Any,
    extra_topk_length: Any,
) -> None:
    """Check which arguments of a sparse call go together, then say that sparse decode is not built.

    Raises:
        ValueError: an argument without the one it belongs to.
        UnsupportedError: always, otherwise.
    """
    if causal:
        raise ValueError(wanted("causal", "False with indices (the indices are the mask)", causal))
    if extra_k_cache is None:
        dependents = {"extra_indices_in_kvcache": extra_indices_in_kvcache, "extra_topk_length": extra_topk_length}
        for name, value in dependents.items():
            if value is not None:
                raise ValueError(wanted(name, "None without extra_k_cache", type(value).__name__))
    elif extra_indices_in_kvcache is None:
        raise ValueError(wanted("extra_indices_in_kvcache", "int32 [b, s_q, extra_topk] with extra_k_cache", None))
    raise not_built_yet("sparse flash_mla_with_kvcache (indices)")


# ---- The other operators.


def check_plan(cache_seqlens: Any, s_q: Any, h_q: Any, h_kv: Any) -> None:
    """Check the arguments of `torch.ops.flash_mla.plan_dense_decode`."""
    check_lengths("cache_seqlens", cache_seqlens)
    for name, value in {"s_q": s_q, "h_q": h_q, "h_kv": h_kv}.items():
        _check_int(name, value)
        if value < 1:
            raise ValueError(wanted(name, "at least 1", value))
    if h_q % h_kv != 0:
        raise ValueError(wanted("h_q", f"a multiple of h_kv = {h_kv}", h_q))


def check_merge(outs: Any, lses: Any) -> None:
    """Check the arguments of `torch.ops.flash_mla.merge_attention_states`."""
    for name, parts in {"outs": outs, "lses": lses}.items():
        if not isinstance(parts, (list, tuple)):
            raise TypeError(wanted(name, "a list of tensors", type(parts).__name__))
    if not 1 <= len(outs) <= MAX_MERGE_PARTS:
        raise ValueError(wanted("outs", f"1 to {MAX_MERGE_PARTS} parts", len(outs)))
    if len(lses) != len(outs):
        raise ValueError(wanted("lses", f"one tensor per part, {len(outs)}", len(lses)))
    for index, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_part(f"outs[{index}]", out, outs[0], f"lses[{index}]", lse)


def _check_part(out_name: str, out: Any, first: Any, lse_name: str, lse: Any) -> None:
    if not isinstance(out, Tensor) or out.dim() not in (3, 4):
        given = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise (ValueError if isinstance(out, Tensor) else TypeError)(
            wanted(out_name, "a tensor [b, s_q, h_q, d] or [tokens, h_q, d]", given)
        )
    _check_dtype(out_name, out, (*HALF_DTYPES, torch.float32))
    if out.dtype != first.dtype:
        raise TypeError(wanted(out_name, f"{first.dtype}, like outs[0]", out.dtype))
    if out.shape != first.shape:
        raise ValueError(wanted(out_name, f"shape {list(first.shape)}, like outs[0]", list(out.shape)))
    _check_last_stride(out_name, out)
    if out.device != first.device:
        raise ValueError(wanted(out_name, f"a tensor on {first.device}, like outs[0]", out.device))
    if out.dim() == 4:
        b, s_q, h_q, _ = out.shape
        _check_lse(lse_name, lse, out.device, "[b, h_q, s_q]", (b, h_q, s_q))
    else:
        tokens, h_q, _ = out.shape
        _check_lse(lse_name, lse, out.device, "[tokens, h_q]", (tokens, h_q))


def _check_lse(name: str, lse: Any, device: torch.device, meaning: str, shape: tuple[int, ...]) -> None:
    _check_tensor(name, lse, len(shape), meaning)
    _check_dtype(name, lse, (torch.float32,))
    _check_shape(name, lse, meaning, shape)
    if lse.device != device:
        raise ValueError(wanted(name, f"a tensor on {device}, like outs", lse.device))
