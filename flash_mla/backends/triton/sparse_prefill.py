"""Sparse prefill over rows of bfloat16 or a quantised cache, in Triton: sparse decode's loop without a schedule.

There are queries enough to fill the machine, so nothing is split: one program computes one query for one tile of its
heads, over its list of rows, and then over its list of rows of a second cache.
"""

from dataclasses import dataclass, replace

import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton import tuning
from flash_mla.backends.triton.config import Gpu, Tile, converts_fp8, sparse_tiles
from flash_mla.backends.triton.dequant import MODEL1, NONE, Format, pages_of
from flash_mla.backends.triton.kv_cache import dequantize_kv_cache
from flash_mla.backends.triton.language import (
    D_ROPE,
    D_V,
    LN2,
    LOG2E,
    final_factor,
    jit_for_any_value,
    lse_base_2,
    rounded,
    times,
    wide,
)
from flash_mla.backends.triton.launch import OPTIONS, device_of
from flash_mla.backends.triton.sparse_decode import Keys, attend_lanes, kinds_of, lanes_of
from flash_mla.kv_format import KVFormat
from flash_mla.problem import HEAD_DIM_V


# Options of the call, and strides that no wide access follows: none of them is worth a compilation.
@jit_for_any_value(
    "h_q",
    "num_head_tiles",
    "has_sink",
    "has_length",
    "has_extra_length",
    "topk",
    "num_slots",
    "extra_topk",
    "extra_num_slots",
    "stride_indices",
    "stride_extra_indices",
    "stride_length",
    "stride_extra_length",
    "stride_max_logits_s",
    "stride_max_logits_h",
    "stride_lse_s",
    "stride_lse_h",
)
def sparse_prefill_kernel(
    q: tl.tensor,
    cache: tl.tensor,
    indices: tl.tensor,
    length: tl.tensor,
    extra_cache: tl.tensor,
    extra_indices: tl.tensor,
    extra_length: tl.tensor,
    attn_sink: tl.tensor,
    out: tl.tensor,
    max_logits: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    lse_unit: tl.tensor,
    d_v: tl.tensor,
    h_q: tl.tensor,
    num_head_tiles: tl.tensor,
    has_sink: tl.tensor,
    has_length: tl.tensor,
    has_extra_length: tl.tensor,
    topk: tl.tensor,
    num_slots: tl.tensor,
    extra_topk: tl.tensor,
    extra_num_slots: tl.tensor,
    stride_q_s: tl.tensor,
    stride_q_h: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    stride_extra_page: tl.tensor,
    stride_extra_token: tl.tensor,
    stride_indices: tl.tensor,
    stride_extra_indices: tl.tensor,
    stride_length: tl.tensor,
    stride_extra_length: tl.tensor,
    stride_out_s: tl.tensor,
    stride_out_h: tl.tensor,
    stride_max_logits_s: tl.tensor,
    stride_max_logits_h: tl.tensor,
    stride_lse_s: tl.tensor,
    stride_lse_h: tl.tensor,
    PAGE: tl.constexpr,
    EXTRA_PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    EXTRA_FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid `(num_head_tiles * s_q,)`: head tiles fastest, so that programs that read the same rows start together.

    `lse_unit` turns a base-2 logarithm into the one that is asked for. With WIDE_V some of V lies behind the first 512
    values of a row. MODEL1's RoPE part is multiplied by itself.
    """
    head_tile = tl.program_id(0) % num_head_tiles
    query = tl.program_id(0) // num_head_tiles
    head = head_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    head64 = head.to(tl.int64)
    exists = head < h_q
    TAIL: tl.constexpr = FORMAT == MODEL1 and BLOCK_M < 64
    column = tl.arange(0, D_V)[None, :]
    rope_column = (D_V - D_ROPE if TAIL else D_V) + tl.arange(0, D_ROPE)[None, :]
    # A sink of -inf changes nothing.
    sink = tl.load(attn_sink + head, mask=exists & has_sink, other=float("-inf"))
    q_rows = q + wide(query) * stride_q_s + head64 * stride_q_h
    q_v = tl.load(q_rows[:, None] + column, mask=exists[:, None], other=0.0)
    q_rope = q_v
    if ROPE or TAIL:
        q_rope = tl.load(q_rows[:, None] + rope_column, mask=exists[:, None], other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D_V], tl.float32)
    acc_rope = row_max
    if WIDE_V or TAIL:
        acc_rope = tl.zeros([BLOCK_M, D_ROPE], tl.float32)
    acc, acc_rope, row_max, row_sum = attend_lanes(
        acc,
        acc_rope,
        row_max,
        row_sum,
        q_v,
        q_rope,
        scale_log2,
        indices + wide(query) * stride_indices,
        0,
        lanes_of(length, has_length, query, 0, stride_length, 0, topk),
        cache,
        num_slots,
        stride_page,
        stride_token,
        PAGE,
        FORMAT,
        HARDWARE,
        ROPE or TAIL,
        WIDE_V or TAIL,
        BLOCK_M,
        BLOCK_N,
    )
    if EXTRA_FORMAT != NONE:
        acc, acc_rope, row_max, row_sum = attend_lanes(
            acc,
            acc_rope,
            row_max,
            row_sum,
            q_v,
            q_rope,
            scale_log2,
            extra_indices + wide(query) * stride_extra_indices,
            0,
            lanes_of(extra_length, has_extra_length, query, 0, stride_extra_length, 0, extra_topk),
            extra_cache,
            extra_num_slots,
            stride_extra_page,
            stride_extra_token,
            EXTRA_PAGE,
            EXTRA_FORMAT,
            HARDWARE,
            ROPE or TAIL,
            WIDE_V or TAIL,
            BLOCK_M,
            BLOCK_N,
        )
    factor = final_factor(row_max, row_sum, sink, True)
    out_rows = out + wide(query) * stride_out_s + head64 * stride_out_h
    result = rounded(times(acc, factor), out.dtype.element_ty)
    shown = tl.minimum(d_v, D_V - D_ROPE) if TAIL else d_v
    tl.store(out_rows[:, None] + column, result, mask=exists[:, None] & (column < shown))
    if WIDE_V or TAIL:
        result = rounded(times(acc_rope, factor), out.dtype.element_ty)
        tl.store(out_rows[:, None] + rope_column, result, mask=exists[:, None] & (rope_column < d_v))
    at = max_logits + wide(query) * stride_max_logits_s + head64 * stride_max_logits_h
    tl.store(at, row_max * LN2, mask=exists)
    at = lse + wide(query) * stride_lse_s + head64 * stride_lse_h
    tl.store(at, lse_base_2(row_max, row_sum, float("inf")) * lse_unit, mask=exists)


# ---- The launch.


@dataclass(frozen=True)
class Call:
    """The tensors and numbers of one call, checked: q `[s_q, h_q, d_qk]`, and keys with indices `[s_q, 1, topk]`.

    Written: `out` `[s_q, h_q, d_v]`, `max_logits` and `lse` `[s_q, h_q]`.
    """

    q: Tensor
    keys: Keys
    extra: Keys | None
    attn_sink: Tensor | None
    sm_scale: float
    lse_base: str
    """ "e" or "2"."""
    out: Tensor
    max_logits: Tensor
    lse: Tensor


MAX_COPY = 256 << 20
"""Bytes that the bfloat16 rows of quantised caches may take."""

MIN_USES = 4
"""How often a row of a quantised cache must be selected, at the mean, to be converted but once."""


def with_plain_rows(call: Call) -> Call:
    """The same call over bfloat16 rows, where its caches are quantised, small, and their rows are selected often."""
    caches = (call.keys,) if call.extra is None else (call.keys, call.extra)
    slots = sum(keys.cache.shape[0] * keys.cache.shape[1] for keys in caches)
    selected = sum(keys.indices.numel() for keys in caches)
    d_qk = call.q.shape[2]
    if not call.keys.format.in_flight or selected < MIN_USES * slots or 2 * d_qk * slots > MAX_COPY:
        return call
    plain = Format.of("BF16", d_qk)
    keys, *extra = (
        replace(keys, cache=dequantize_kv_cache(keys.cache, KVFormat[keys.format.name]), format=plain)
        for keys in caches
    )
    return replace(call, keys=keys, extra=extra[0] if extra else None)


def sparse_prefill(call: Call, tile: Tile | None = None) -> None:
    """Attention of each query over its own rows. `tile`: how to cut, by default what suits the GPU."""
    s_q, h_q, d_qk = call.q.shape
    if s_q == 0:
        return
    call = with_plain_rows(call)
    gpu = Gpu.of(call.q.device)
    keys, extra = call.keys, call.extra or call.keys
    if tile is None:
        kind = ("sparse_prefill", *kinds_of((keys, extra)), h_q, call.out.shape[2], tuning.size_class(s_q))
        tiles = sparse_tiles(
            gpu, h_q, d_qk, max(keys.format.in_flight, extra.format.in_flight), call.out.shape[2] > HEAD_DIM_V
        )
        tile = tuning.choose(kind, tiles, call.q.device, lambda tile: sparse_prefill(call, tile))
    tensors, sizes = keys.arguments()
    extra_tensors, extra_sizes = extra.arguments()
    page, *strides = pages_of(keys.cache, keys.format)
    extra_page, *extra_strides = pages_of(extra.cache, extra.format)
    head_tiles = -(-h_q // tile.block_m)
    with device_of(call.q):
        sparse_prefill_kernel[(head_tiles * s_q,)](
            call.q,
            *tensors,
            *extra_tensors,
            call.lse if call.attn_sink is None else call.attn_sink,
            call.out,
            call.max_logits,
            call.lse,
            float(call.sm_scale * LOG2E.value),
            1.0 if call.lse_base == "2" else float(LN2.value),
            call.out.shape[2],
            h_q,
            head_tiles,
            call.attn_sink is not None,
            keys.length is not None,
            extra.length is not None,
            *sizes,
            *extra_sizes,
            *call.q.stride()[:2],
            *strides,
            *extra_strides,
            keys.indices.stride(0),
            extra.indices.stride(0),
            keys.length_strides()[0],
            extra.length_strides()[0],
            *call.out.stride()[:2],
            *call.max_logits.stride(),
            *call.lse.stride(),
            PAGE=page,
            EXTRA_PAGE=extra_page,
            FORMAT=int(keys.format),
            EXTRA_FORMAT=int(Format.NONE if call.extra is None else extra.format),
            HARDWARE=converts_fp8(gpu),
            ROPE=d_qk > HEAD_DIM_V,
            WIDE_V=call.out.shape[2] > HEAD_DIM_V,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )
