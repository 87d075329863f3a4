"""Dense decode over a paged cache of bfloat16, float16 or FP8: split-KV attention, in Triton.

A row of a tile is a (token, head) pair of one key head, so few heads with several tokens fill a tile as well as many
heads do. V is the first 512 values of K: each tile of keys is loaded once and used in both products. One program
computes what one part of the schedule asks for, for one row tile of one key head.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton import tuning
from flash_mla.backends.triton.combine import MAX_CUTS, launch_combine
from flash_mla.backends.triton.config import LONG_KEYS, Gpu, Tile, converts_fp8, dense_tiles, sparse_tiles
from flash_mla.backends.triton.dequant import MODEL1, NONE, Format, load_tokens
from flash_mla.backends.triton.language import (
    D_ROPE,
    D_V,
    LOG2E,
    NOTHING,
    SCHEDULE_BLOCK,
    WHOLE,
    ceil_div,
    dot,
    fixed_cut_blocks,
    jit,
    jit_for_any_value,
    piece_of,
    rounded,
    scores_of,
    softmax_step,
    store_partial,
    store_result,
    wide,
)
from flash_mla.backends.triton.launch import MAX_GRID_Y, OPTIONS, device_of
from flash_mla.problem import HEAD_DIM_V

INT32_MAX = 2**31 - 1


@jit
def load_pages(
    table_row: tl.tensor, start: tl.tensor, end: tl.tensor, PAGE: tl.constexpr, BLOCK_N: tl.constexpr
) -> Any:
    """Pages of the keys `[start, start + BLOCK_N)` of a request: one number where they all lie in one page.

    Keys at and past `end` stand for the last one before it: their table entries may hold garbage.
    """
    if PAGE % BLOCK_N == 0:  # `start` is a multiple of BLOCK_N
        pages = tl.load(table_row + tl.minimum(start, end - 1) // PAGE, mask=end > 0, other=0)
    else:
        position = tl.minimum(start + tl.arange(0, BLOCK_N), end - 1)
        pages = tl.load(table_row + position // PAGE, mask=position >= 0, other=0)
    return pages


@jit
def load_keys(
    k_head: tl.tensor,
    page: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    num_pages: tl.tensor,
    stride_k_page: tl.tensor,
    stride_k_row: tl.tensor,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    CHUNKED: tl.constexpr,
) -> Any:
    """Keys `[start, start + BLOCK_N)` of a request: V's part `[BLOCK_N, 512]` and the rest.

    In place of keys at and past `end` stands the last one before it. What lies in unused slots could be NaN, and their
    probability of 0 would not keep it out of the sum. This costs no predicate for each load, as a mask does.
    """
    # An entry that names no page is the caller's mistake. It must not become a wild address.
    page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
    row = tl.minimum(tl.arange(0, BLOCK_N), end - 1 - start)
    if FORMAT != NONE:
        first = k_head + page.to(tl.int64) * stride_k_page
        all_valid = tl.full([BLOCK_N], 1, tl.int1)
        in_page = (start + row) % PAGE
        k, k_rope = load_tokens(first, in_page, all_valid, stride_k_row, PAGE, FORMAT, HARDWARE, BLOCK_N, CHUNKED)
    else:
        if PAGE % BLOCK_N == 0:  # one 64-bit address and 32-bit distances from it save registers
            first = k_head + (page.to(tl.int64) * stride_k_page + wide(start % PAGE) * stride_k_row)
            rows = first + (row.to(tl.int64) if WIDE_ROWS else row) * stride_k_row
        else:
            rows = k_head + (page.to(tl.int64) * stride_k_page + ((start + row) % PAGE).to(tl.int64) * stride_k_row)
        k = tl.load(rows[:, None] + tl.arange(0, D_V)[None, :])
        k_rope = k
        if ROPE:
            k_rope = tl.load(rows[:, None] + D_V + tl.arange(0, D_ROPE)[None, :])
    return k, k_rope


@jit_for_any_value("b", "s_q", "group", "num_row_tiles", "num_pages", "max_keys", "num_parts", "max_cuts", "first")
def dense_decode_kernel(
    q: tl.tensor,
    k_cache: tl.tensor,
    block_table: tl.tensor,
    cache_seqlens: tl.tensor,
    schedule: tl.tensor,
    attn_sink: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    descale: tl.tensor,
    scale_log2: tl.tensor,
    b: tl.tensor,
    s_q: tl.tensor,
    group: tl.tensor,
    num_row_tiles: tl.tensor,
    num_pages: tl.tensor,
    max_keys: tl.tensor,
    num_parts: tl.tensor,
    max_cuts: tl.tensor,
    first: tl.tensor,
    stride_q_b: tl.tensor,
    stride_q_s: tl.tensor,
    stride_q_h: tl.tensor,
    stride_k_page: tl.tensor,
    stride_k_row: tl.tensor,
    stride_k_h: tl.tensor,
    stride_table_b: tl.tensor,
    stride_out_b: tl.tensor,
    stride_out_s: tl.tensor,
    stride_out_h: tl.tensor,
    stride_lse_b: tl.tensor,
    stride_lse_h: tl.tensor,
    stride_lse_s: tl.tensor,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    DESCALE: tl.constexpr,
    PAGE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    HAS_SINK: tl.constexpr,
    FIXED_CUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid `(num_row_tiles * h_kv, parts)`: row tiles fastest, so that programs that read the same keys start together.

    With FIXED_CUTS part p is piece `p % max_cuts` of request `first + p // max_cuts`, and `schedule` is not read.
    FORMAT is NONE for keys of q's dtype; else `k_cache` points to bytes. With DESCALE `descale` has a factor for the
    scores and one for the values.

    Partial results are float32 `[parts * 2, h_kv, num_row_tiles * BLOCK_M, 512]` (with FIXED_CUTS one per part), each
    the attention over the keys of one piece; `partial_lse` `[...]` holds the base-2 logarithm of each row's sum.
    """
    TAIL: tl.constexpr = FORMAT == MODEL1 and BLOCK_M < 64
    row_tile = tl.program_id(0) % num_row_tiles
    kv_head = tl.program_id(0) // num_row_tiles
    part = tl.program_id(1)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    token = rows // group
    head = kv_head * group + rows % group
    row_exists = token < s_q
    columns = tl.arange(0, D_V)
    # Keys at the end of a request that no row of this tile sees.
    hidden = 0
    if CAUSAL:
        hidden = tl.maximum(s_q - 1 - (row_tile * BLOCK_M + BLOCK_M - 1) // group, 0)
    k_head = k_cache + kv_head.to(tl.int64) * stride_k_h
    sink = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINK:
        sink = tl.load(attn_sink + head, mask=row_exists, other=0.0)
    if DESCALE:
        scale_log2 *= tl.load(descale)

    if FIXED_CUTS:
        begin_request = first + part // max_cuts
        end_request = begin_request
    else:
        begin_request = tl.load(schedule + part * 8)
        end_request = tl.minimum(tl.load(schedule + part * 8 + 1), b - 1)
        end_request = tl.where(begin_request < b, end_request, -1)

    for request in range(begin_request, end_request + 1):
        seqlen = tl.minimum(tl.maximum(tl.load(cache_seqlens + request), 0), max_keys)
        if FIXED_CUTS:
            num_blocks = tl.maximum(ceil_div(seqlen, SCHEDULE_BLOCK), 1)
            cut_blocks = fixed_cut_blocks(num_blocks, max_cuts)
            begin = (part % max_cuts) * cut_blocks
            end = begin + cut_blocks
            partial = tl.where(cut_blocks < num_blocks, part, WHOLE)
            partial = tl.where(begin < num_blocks, partial, NOTHING)
        else:
            begin, end, partial = piece_of(schedule, part, num_parts, request, begin_request, end_request)
        end_key = tl.minimum(tl.minimum(end, ceil_div(seqlen, SCHEDULE_BLOCK)) * SCHEDULE_BLOCK, seqlen)
        visible = tl.minimum(end_key, seqlen - hidden)
        limit = tl.zeros([BLOCK_M], tl.int32) + end_key
        if CAUSAL:
            limit = tl.minimum(limit, seqlen - (s_q - 1 - token))
        request64 = wide(request)
        table_row = block_table + request64 * stride_table_b
        q_rows = q + request64 * stride_q_b + token.to(tl.int64) * stride_q_s + head.to(tl.int64) * stride_q_h
        q_v = tl.load(q_rows[:, None] + columns[None, :], mask=row_exists[:, None], other=0.0)
        q_rope = q_v
        if ROPE or TAIL:
            rope_column = (D_V - D_ROPE if TAIL else D_V) + tl.arange(0, D_ROPE)[None, :]
            q_rope = tl.load(q_rows[:, None] + rope_column, mask=row_exists[:, None], other=0.0)

        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_V], tl.float32)
        acc_rope = row_max
        if TAIL:
            acc_rope = tl.zeros([BLOCK_M, D_ROPE], tl.float32)
        # Loaded one tile ahead: the keys' addresses must not wait for the table. Handed on as it was loaded: the
        # compiler loads it early enough only where nothing is computed with it before the next tile.
        page = load_pages(table_row, begin * SCHEDULE_BLOCK, end_key, PAGE, BLOCK_N)
        for start in range(begin * SCHEDULE_BLOCK, visible, BLOCK_N):
            k, k_rope = load_keys(
                k_head,
                page,
                start,
                end_key,
                num_pages,
                stride_k_page,
                stride_k_row,
                FORMAT,
                HARDWARE,
                PAGE,
                BLOCK_N,
                ROPE,
                WIDE_ROWS,
                BLOCK_M >= 64,
            )
            page = load_pages(table_row, start + BLOCK_N, end_key, PAGE, BLOCK_N)
            scores = scores_of(q_v, q_rope, k, k_rope, scale_log2, ROPE or TAIL, BLOCK_M, BLOCK_N)
            position = start + tl.arange(0, BLOCK_N)
            scores = tl.where(position[None, :] < limit[:, None], scores, float("-inf"))
            p, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, start < end_key, BLOCK_M)
            probabilities = rounded(p, k.dtype)
            acc = dot(probabilities, k, acc * rescale[:, None])
            if TAIL:
                acc_rope = dot(probabilities, k_rope, acc_rope * rescale[:, None])
        if DESCALE:
            acc *= tl.load(descale + 1)

        if partial == WHOLE:
            out_rows = (
                out + request64 * stride_out_b + token.to(tl.int64) * stride_out_s + head.to(tl.int64) * stride_out_h
            )
            lse_rows = (
                lse + request64 * stride_lse_b + token.to(tl.int64) * stride_lse_s + head.to(tl.int64) * stride_lse_h
            )
            store_result(out_rows, lse_rows, acc, acc_rope, row_max, row_sum, sink, row_exists, HAS_SINK, TAIL)
        elif partial != NOTHING:
            tile = wide(partial) * tl.num_programs(0) + tl.program_id(0)
            store_partial(partial_out, partial_lse, tile, acc, acc_rope, row_max, row_sum, row_exists, BLOCK_M, TAIL)


# ---- The launch.


@dataclass(frozen=True)
class Call:
    """The tensors and numbers of one call, checked. `out` and `lse` are written."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    attn_sink: Tensor | None
    softmax_scale: float
    causal: bool
    out: Tensor
    lse: Tensor
    format: Format = Format.NONE
    """Of a cache of bytes; NONE for one of q's dtype."""
    descale: Tensor | None = None
    """float32 `[2]`: factors on the scores and on the values, where there are any."""

    @staticmethod
    def of_bytes(call: "Call", kv_format: str | None, descale_q: Tensor | None, descale_k: Tensor | None) -> "Call":
        """The call over a cache of `kv_format`, or e4m3 values times `descale_k`; an e4m3 q times `descale_q`.

        e4m3 is exact in bfloat16; its scales are multiplied in float32, by scores and results.
        """
        descale = None
        if descale_q is not None or descale_k is not None:
            ones = call.lse.new_ones(1)
            by_q, by_k = (ones if scale is None else scale.view(1) for scale in (descale_q, descale_k))
            descale = torch.cat((by_q * by_k, by_k))
        return replace(
            call,
            q=call.q.to(torch.bfloat16),
            k_cache=call.k_cache.view(torch.uint8),
            format=Format.of(kv_format, call.q.shape[-1]),
            descale=descale,
        )


def dense_decode(call: Call, schedule: Tensor, num_splits: Tensor, tile: Tile | None = None) -> None:
    """Decode as a schedule says: int32 `[parts, 8]` and `[b + 1]`.

    Args:
        call: what to compute.
        schedule, num_splits: made for these lengths or for others.
        tile: how to cut, by default what suits the GPU.
    """
    if call.q.shape[0] == 0:
        return
    parts = schedule.shape[0]
    if tile is None:
        b, s_q, h_q, d_qk = call.q.shape
        page, h_kv = call.k_cache.shape[1:3]
        classes = tuning.size_class(b), tuning.size_class(_max_keys(call))
        kind = ("dense_decode", call.format.name, d_qk, s_q, h_q, h_kv, page, *classes)
        tiles = _tiles(call, _max_keys(call) >= LONG_KEYS)
        tile = tuning.choose(kind, tiles, call.q.device, lambda tile: dense_decode(call, schedule, num_splits, tile))
    partials = _partials(call, tile, 2 * parts) if parts > 1 else (call.lse, call.lse)
    with device_of(call.q):
        _launch(call, tile, partials, parts, schedule=schedule)
        if parts > 1:
            _join(call, tile, partials, parts, schedule=schedule, num_splits=num_splits)


def dense_decode_batch_invariant(call: Call, tile: Tile | None = None) -> None:
    """Decode with cuts that depend on each request's length alone, in as many rounds as bounded memory needs."""
    b, s_q, h_q, _ = call.q.shape
    tile = tile or _tiles(call)[0]
    h_kv = call.k_cache.shape[2]
    tiles = h_kv * -(-s_q * (h_q // h_kv) // tile.block_m)
    limit = 2 * Gpu.of(call.q.device).num_sms
    max_cuts = max(1, min(limit // tiles, MAX_CUTS))
    at_once = max(1, limit // (tiles * max_cuts)) if max_cuts > 1 else max(1, min(b, MAX_GRID_Y))
    partials = _partials(call, tile, min(at_once, b) * max_cuts) if max_cuts > 1 else (call.lse, call.lse)
    with device_of(call.q):
        for first in range(0, b, at_once):
            requests = min(at_once, b - first)
            _launch(call, tile, partials, requests * max_cuts, max_cuts=max_cuts, first=first)
            if max_cuts > 1:
                _join(call, tile, partials, requests, max_cuts=max_cuts, first=first)


def _tiles(call: Call, long: bool = False) -> tuple[Tile, ...]:
    _, s_q, h_q, d_qk = call.q.shape
    gpu, rows = Gpu.of(call.q.device), s_q * (h_q // call.k_cache.shape[2])
    if call.format is not Format.NONE:
        return sparse_tiles(gpu, rows, d_qk, call.format.in_flight)
    return dense_tiles(gpu, rows, d_qk, long)


def _row_tiles(call: Call, tile: Tile) -> int:
    _, s_q, h_q, _ = call.q.shape
    return -(-s_q * (h_q // call.k_cache.shape[2]) // tile.block_m)


def _max_keys(call: Call) -> int:
    """The most keys that the block table can name, within 32 bits."""
    return min(call.block_table.shape[1] * call.k_cache.shape[1], INT32_MAX)


def _partials(call: Call, tile: Tile, count: int) -> tuple[Tensor, Tensor]:
    """Memory for `count` partial results of all rows: values, and a logarithm for each row."""
    rows = count * call.k_cache.shape[2] * _row_tiles(call, tile) * tile.block_m
    new = call.lse.new_empty
    return new((rows, HEAD_DIM_V)), new((rows,))


def _launch(
    call: Call,
    tile: Tile,
    partials: tuple[Tensor, Tensor],
    parts: int,
    schedule: Tensor | None = None,
    max_cuts: int = 1,
    first: int = 0,
) -> None:
    b, s_q, h_q, d_qk = call.q.shape
    num_pages, page, h_kv, _ = call.k_cache.shape
    row_tiles = _row_tiles(call, tile)
    dense_decode_kernel[(row_tiles * h_kv, parts)](
        call.q,
        call.k_cache,
        call.block_table,
        call.cache_seqlens,
        call.cache_seqlens if schedule is None else schedule,
        call.lse if call.attn_sink is None else call.attn_sink,
        call.out,
        call.lse,
        *partials,
        call.lse if call.descale is None else call.descale,
        float(call.softmax_scale * LOG2E.value),
        b,
        s_q,
        h_q // h_kv,
        row_tiles,
        num_pages,
        _max_keys(call),
        parts,
        max_cuts,
        first,
        *call.q.stride()[:3],
        *call.k_cache.stride()[:3],
        call.block_table.stride(0),
        *call.out.stride()[:3],
        *call.lse.stride(),
        FORMAT=int(call.format),
        HARDWARE=converts_fp8(Gpu.of(call.q.device)),
        DESCALE=call.descale is not None,
        PAGE=page,
        ROPE=d_qk > HEAD_DIM_V,
        WIDE_ROWS=call.k_cache.stride(1) * tile.block_n > INT32_MAX,
        CAUSAL=call.causal,
        HAS_SINK=call.attn_sink is not None,
        FIXED_CUTS=schedule is None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )


def _join(call: Call, tile: Tile, partials: tuple[Tensor, Tensor], candidates: int, **cuts: Any) -> None:
    rows = _row_tiles(call, tile) * tile.block_m
    launch_combine(
        partials,
        call.out,
        call.lse,
        call.attn_sink,
        candidates,
        head_group=call.q.shape[2] // call.k_cache.shape[2],
        partial_rows=call.k_cache.shape[2] * rows,
        rows_per_group=rows,
        rows_per_token=call.q.shape[2] // call.k_cache.shape[2],
        lengths=call.cache_seqlens,
        max_keys=_max_keys(call),
        **cuts,
    )
