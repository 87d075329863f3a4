"""What a call asks for, and whether it may: the problem that kernels are chosen by, and every check of an argument.

The native operators check their arguments themselves, for memory safety and speed. These checks run before the
reference backend, in the fake functions, and whenever a native operator refused a call, so that an error reads the
same on every
backend: it names the argument, what was wanted and what came.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from flash_mla import kv_format as formats
from flash_mla.arguments import (
    check_contiguous,
    check_device,
    check_dtype,
    check_flag,
    check_int,
    check_last_stride,
    check_scale,
    check_shape,
    check_sink,
    check_tensor,
)
from flash_mla.errors import wanted
from flash_mla.kv_format import KVFormat

BLOCK_KEYS = 64
"""Keys per block of a schedule."""

ROW_FIELDS = 8
"""int32 fields per row of a schedule."""

ROW_TILE = 64
"""Rows that the CUDA kernels compute together: partial results are of so many."""

REFERENCE_PARTS = 8
"""Rows that the PyTorch planner makes; the reference backend does not depend on the number."""

MAX_PARTS = 65535
"""Rows that a schedule may have."""

MAX_MERGE_PARTS = 16
"""Parts that `merge_attention_states` joins in one call."""

HEAD_DIM_V = 512
HEAD_DIMS_QK = (512, 576)
HALF_DTYPES = (torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


class Problem(Protocol):
    """What the choice of a kernel depends on, whatever the operation."""

    op: ClassVar[str]

    @property
    def device_type(self) -> str:
        """ "cuda", "cpu", ..."""

    @property
    def compute_capability(self) -> int | None:
        """90 for 9.0; None away from CUDA."""


@dataclass(frozen=True)
class DenseDecodeProblem:
    """What the choice of a dense decode kernel depends on."""

    op: ClassVar[str] = "dense_decode"

    device_type: str
    """"cuda", "cpu", ..."""
    compute_capability: int | None
    """90 for 9.0; None away from CUDA."""
    dtype: torch.dtype
    """Of q, and of the cache if that is no FP8 cache."""
    b: int
    s_q: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    page_block_size: int
    softmax_scale: float
    fp8_cache: str | None = None
    """Format of an FP8 cache, or "E4M3" where a whole tensor has one scale."""

    @staticmethod
    def of(
        q: Tensor,
        k_cache: Tensor,
        head_dim_v: int = HEAD_DIM_V,
        softmax_scale: float | None = None,
        kv_format: KVFormat | str | None = None,
    ) -> "DenseDecodeProblem":
        """The problem of a call with these tensors (`q` `[b, s_q, h_q, d_qk]`, `k_cache` `[num_blocks, page, h_kv,
        d_qk or bytes per token]`).
        """
        b, s_q, h_q, d_qk = q.shape
        _, page, h_kv, _ = k_cache.shape
        scale = default_softmax_scale(d_qk) if softmax_scale is None else softmax_scale
        fp8_cache = None
        if k_cache.dtype in formats.BYTE_DTYPES:
            known = dense_fp8_format(k_cache, d_qk, kv_format)
            fp8_cache = "E4M3" if known is None else known.value
        where = device_of(q)
        return DenseDecodeProblem(*where, q.dtype, b, s_q, h_q, h_kv, d_qk, head_dim_v, page, scale, fp8_cache)


def device_of(tensor: Tensor) -> tuple[str, int | None]:
    """Device type, and compute capability on CUDA."""
    if tensor.device.type != "cuda":
        return tensor.device.type, None
    major, minor = torch.cuda.get_device_capability(tensor.device)
    return "cuda", 10 * major + minor


def dense_fp8_format(k_cache: Tensor, d_qk: int, kv_format: KVFormat | str | None) -> KVFormat | None:
    """The format of an FP8 cache of a dense call; None for e4m3 values with one scale for the tensor."""
    if kv_format is None and k_cache.dtype == FP8 and k_cache.dim() == 4 and k_cache.shape[-1] == d_qk:
        return None
    return formats.resolve("k_cache", k_cache, d_qk, kv_format)


def default_softmax_scale(d_qk: int) -> float:
    """`1 / sqrt(d_qk)`."""
    return float(d_qk**-0.5)


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
    """
    _check_query_and_cache(q, k_cache)
    _check_dense_options(head_dim_v, softmax_scale, causal, batch_invariant)
    _check_paging(q, block_table, cache_seqlens)
    if not batch_invariant:
        check_schedule(q, tile_scheduler_metadata, num_splits)
    check_sink(attn_sink, q.shape[2], q.device)
    check_outputs(q, head_dim_v, out, lse)


def check_dense_decode_fp8(
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
    descale_q: Any,
    descale_k: Any,
    kv_format: Any,
    out: Any = None,
    lse: Any = None,
) -> None:
    """Check the arguments of `torch.ops.flash_mla.dense_decode_fp8` (and of its `_out` form).

    Raises:
        ValueError, TypeError: naming the wrong argument.
    """
    check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    check_dtype("q", q, (torch.bfloat16, FP8))
    check_tensor("k_cache", k_cache, 4, "[num_blocks, page_block_size, h_kv, d_qk or bytes per token]")
    check_device("k_cache", k_cache, q.device)
    if kv_format is None:
        check_dtype("k_cache", k_cache, (FP8,))
        _check_dense_shapes(q, k_cache)
    else:
        known = formats.parse(kv_format)
        if known in (KVFormat.BF16, KVFormat.V41_FP4):
            raise ValueError(wanted("kv_format", "an FP8 format in a dense call", known.value))
        formats.check_cache("k_cache", k_cache, known)
        _check_query(q, known.layout.d_qk)
    _check_descale("descale_k", descale_k, kv_format is None, f"a k_cache of {k_cache.dtype} without scales", q)
    _check_descale("descale_q", descale_q, q.dtype == FP8, "an FP8 q", q)
    _check_dense_options(head_dim_v, softmax_scale, causal, batch_invariant)
    _check_paging(q, block_table, cache_seqlens)
    if not batch_invariant:
        check_schedule(q, tile_scheduler_metadata, num_splits)
    check_sink(attn_sink, q.shape[2], q.device)
    check_outputs(q, head_dim_v, out, lse)


def _check_descale(name: str, value: Any, needed: bool, what: str, q: Tensor) -> None:
    if not needed:
        if value is not None:
            raise ValueError(wanted(name, f"None without {what}", type(value).__name__))
        return
    if not isinstance(value, Tensor):
        given = "None" if value is None else type(value).__name__
        raise TypeError(wanted(name, f"a float32 tensor of one number with {what}", given))
    check_dtype(name, value, (torch.float32,))
    if value.numel() != 1:
        raise ValueError(wanted(name, "a tensor of one number", f"shape {list(value.shape)}"))
    check_device(name, value, q.device)


def _check_dense_options(head_dim_v: Any, softmax_scale: Any, causal: Any, batch_invariant: Any) -> None:
    check_int("head_dim_v", head_dim_v)
    if head_dim_v != HEAD_DIM_V:
        raise ValueError(wanted("head_dim_v", str(HEAD_DIM_V), head_dim_v))
    check_scale(softmax_scale)
    check_flag("causal", causal)
    check_flag("enable_batch_invariant", batch_invariant)


def out_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the output of a decode call with this query."""
    return torch.bfloat16 if q.dtype == FP8 else q.dtype


def check_outputs(q: Tensor, head_dim_v: int, out: Any, lse: Any) -> None:
    """Check the outputs that a decode call was given, if any."""
    b, s_q, h_q, _ = q.shape
    if out is not None:
        check_tensor("out", out, 4, "[b, s_q, h_q, head_dim_v]")
        check_dtype("out", out, (out_dtype(q),))
        check_shape("out", out, "[b, s_q, h_q, head_dim_v]", (b, s_q, h_q, head_dim_v))
        check_device("out", out, q.device)
        check_last_stride("out", out)
    if lse is not None:
        check_tensor("lse", lse, 3, "[b, h_q, s_q]")
        check_dtype("lse", lse, (torch.float32,))
        check_shape("lse", lse, "[b, h_q, s_q]", (b, h_q, s_q))
        check_device("lse", lse, q.device)


def _check_query_and_cache(q: Any, k_cache: Any) -> None:
    check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    check_tensor("k_cache", k_cache, 4, "[num_blocks, page_block_size, h_kv, d_qk]")
    check_dtype("q", q, HALF_DTYPES)
    if k_cache.dtype != q.dtype:
        raise TypeError(wanted("k_cache", f"{q.dtype}, like q", k_cache.dtype))
    check_device("k_cache", k_cache, q.device)
    _check_dense_shapes(q, k_cache)


def _check_dense_shapes(q: Tensor, k_cache: Tensor) -> None:
    """Check a query and a cache of plain values against each other."""
    h_q, d_qk = q.shape[2:]
    num_blocks, page, h_kv, d_k = k_cache.shape
    if d_qk not in HEAD_DIMS_QK:
        raise ValueError(wanted("q", "d_qk (last dimension) 576 or 512", d_qk))
    if d_k != d_qk:
        raise ValueError(wanted("k_cache", f"a last dimension of d_qk = {d_qk}, like q", d_k))
    _check_query(q, d_qk)
    if num_blocks < 1 or page < 1 or h_kv < 1:
        raise ValueError(
            wanted("k_cache", "num_blocks, page_block_size and h_kv of at least 1", f"shape {list(k_cache.shape)}")
        )
    if h_q % h_kv != 0:
        raise ValueError(wanted("q", f"h_q that is a multiple of h_kv = {h_kv}", f"h_q = {h_q}"))
    check_last_stride("k_cache", k_cache)


def _check_query(q: Tensor, d_qk: int) -> None:
    if q.shape[-1] != d_qk:
        raise ValueError(wanted("q", f"d_qk = {d_qk}, like k_cache", q.shape[-1]))
    if q.shape[1] < 1 or q.shape[2] < 1:
        raise ValueError(wanted("q", "s_q and h_q of at least 1", f"shape {list(q.shape)}"))
    check_last_stride("q", q)


def _check_paging(q: Tensor, block_table: Any, cache_seqlens: Any) -> None:
    b = q.shape[0]
    check_tensor("block_table", block_table, 2, "[b, max_blocks]")
    check_dtype("block_table", block_table, (torch.int32,))
    check_device("block_table", block_table, q.device)
    if block_table.shape[0] != b:
        raise ValueError(wanted("block_table", f"[b, max_blocks] with b = {b}", f"shape {list(block_table.shape)}"))
    check_last_stride("block_table", block_table)
    check_lengths("cache_seqlens", cache_seqlens)
    check_shape("cache_seqlens", cache_seqlens, "[b]", (b,))
    check_device("cache_seqlens", cache_seqlens, q.device)


def check_lengths(name: str, lengths: Any) -> None:
    """Check a tensor of lengths: int32 `[b]`, contiguous."""
    check_tensor(name, lengths, 1, "[b]")
    check_dtype(name, lengths, (torch.int32,))
    check_contiguous(name, lengths)


def check_schedule(q: Tensor, rows: Any, num_splits: Any) -> None:
    """Check the tensors of a schedule for a call with this q."""
    b = q.shape[0]
    check_tensor("tile_scheduler_metadata", rows, 2, "[num_sm_parts, 8] or a FlashMLASchedMeta")
    check_dtype("tile_scheduler_metadata", rows, (torch.int32,))
    if not 1 <= rows.shape[0] <= MAX_PARTS or rows.shape[1] != ROW_FIELDS:
        meaning = f"shape [num_sm_parts, 8] with 1 to {MAX_PARTS} rows"
        raise ValueError(wanted("tile_scheduler_metadata", meaning, list(rows.shape)))
    check_device("tile_scheduler_metadata", rows, q.device)
    check_contiguous("tile_scheduler_metadata", rows)
    check_tensor("num_splits", num_splits, 1, "[b + 1]")
    check_dtype("num_splits", num_splits, (torch.int32,))
    check_shape("num_splits", num_splits, "[b + 1]", (b + 1,))
    check_device("num_splits", num_splits, q.device)
    check_contiguous("num_splits", num_splits)


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
    if not isinstance(k_cache, Tensor) or k_cache.dtype in formats.BYTE_DTYPES:
        return
    if is_fp8_kvcache:
        raise ValueError(wanted("is_fp8_kvcache", f"False, since k_cache is {k_cache.dtype}", True))
    for name, value in {"kv_format": kv_format, "descale_q": descale_q, "descale_k": descale_k}.items():
        if value is not None:
            raise ValueError(wanted(name, f"None with a k_cache of {k_cache.dtype}", type(value).__name__))


# ---- The other operators.


def check_plan(cache_seqlens: Any, s_q: Any, h_q: Any, h_kv: Any) -> None:
    """Check the arguments of `torch.ops.flash_mla.plan_dense_decode`."""
    check_lengths("cache_seqlens", cache_seqlens)
    for name, value in {"s_q": s_q, "h_q": h_q, "h_kv": h_kv}.items():
        check_int(name, value, least=1)
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
    check_dtype(out_name, out, (*HALF_DTYPES, torch.float32))
    if out.dtype != first.dtype:
        raise TypeError(wanted(out_name, f"{first.dtype}, like outs[0]", out.dtype))
    if out.shape != first.shape:
        raise ValueError(wanted(out_name, f"shape {list(first.shape)}, like outs[0]", list(out.shape)))
    check_last_stride(out_name, out)
    if out.device != first.device:
        raise ValueError(wanted(out_name, f"a tensor on {first.device}, like outs[0]", out.device))
    if out.dim() == 4:
        b, s_q, h_q, _ = out.shape
        _check_lse(lse_name, lse, out.device, "[b, h_q, s_q]", (b, h_q, s_q))
    else:
        tokens, h_q, _ = out.shape
        _check_lse(lse_name, lse, out.device, "[tokens, h_q]", (tokens, h_q))


def _check_lse(name: str, lse: Any, device: torch.device, meaning: str, shape: tuple[int, ...]) -> None:
    check_tensor(name, lse, len(shape), meaning)
    check_dtype(name, lse, (torch.float32,))
    check_shape(name, lse, meaning, shape)
    if lse.device != device:
        raise ValueError(wanted(name, f"a tensor on {device}, like outs", lse.device))
