"""Sparse decode over quantised or bfloat16 caches: each query has its own list of keys, perhaps in two caches.

The rows of a tile are heads of one query, since the next query has other keys. The blocks of a request are 64 lanes of
its first index list each, at least one, and then 64 lanes of the second: the schedule cuts that sequence.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flash_mla.backends.reference_schedule import blocks_of
from flash_mla.backends.triton import tuning
from flash_mla.backends.triton.combine import MAX_CUTS, launch_combine
from flash_mla.backends.triton.config import Gpu, Tile, converts_fp8, sparse_tiles
from flash_mla.backends.triton.dequant import MODEL1, NONE, Format, load_tokens, pages_of
from flash_mla.backends.triton.language import (
    D_ROPE,
    D_V,
    LEAST_CUT,
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
from flash_mla.problem_sparse import as_cache


@jit
def load_lanes(row: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_N: tl.constexpr) -> Any:
    """Lanes `[start, start + BLOCK_N)` of an index list; -1 for those at and past `end`."""
    lane = start + tl.arange(0, BLOCK_N)
    return tl.load(row + lane, mask=lane < end, other=-1)


@jit
def attend_lanes(
    acc: tl.tensor,
    acc_rope: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    q_v: tl.tensor,
    q_rope: tl.tensor,
    scale_log2: tl.tensor,
    row: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    cache: tl.tensor,
    num_slots: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROPE: tl.constexpr,
    WIDE_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Add the keys of lanes `[begin, end)` of one index list to the online softmax.

    With WIDE_V `acc_rope` `[BLOCK_M, 64]` sums the RoPE part, else it is handed back as it is.
    """
    # Loaded one tile ahead: the keys' addresses must not wait for the list. Handed on as it was loaded: the compiler
    # loads it early enough only where nothing is computed with it before the next tile.
    index = load_lanes(row, begin, end, BLOCK_N)
    for start in range(begin, end, BLOCK_N):
        valid = (index >= 0) & (index < num_slots)
        slot = tl.where(valid, index, 0)
        first = cache + (slot // PAGE).to(tl.int64) * stride_page
        k, k_rope = load_tokens(first, slot % PAGE, valid, stride_token, PAGE, FORMAT, HARDWARE, BLOCK_N, BLOCK_M >= 64)
        index = load_lanes(row, start + BLOCK_N, end, BLOCK_N)
        scores = scores_of(q_v, q_rope, k, k_rope, scale_log2, ROPE, BLOCK_M, BLOCK_N)
        scores = tl.where(valid[None, :], scores, float("-inf"))
        p, rescale, row_max, row_sum = softmax_step(scores, row_max, row_sum, num_slots > 0, BLOCK_M)
        probabilities = rounded(p, k.dtype)
        acc = dot(probabilities, k, acc * rescale[:, None])
        if WIDE_V:
            acc_rope = dot(probabilities, k_rope, acc_rope * rescale[:, None])
    return acc, acc_rope, row_max, row_sum


@jit
def lanes_of(
    length: tl.tensor,
    has_length: tl.tensor,
    request: tl.tensor,
    token: tl.tensor,
    stride_b: tl.tensor,
    stride_s: tl.tensor,
    topk: tl.tensor,
) -> Any:
    """How many lanes of an index list count: all, unless there is a `length`."""
    lanes = tl.load(length + wide(request) * stride_b + wide(token) * stride_s, mask=has_length, other=topk)
    return tl.minimum(tl.maximum(lanes, 0), topk)


# Options of the call, and strides that no wide load follows: none of them is worth a compilation.
@jit_for_any_value(
    "b",
    "h_q",
    "num_head_tiles",
    "num_parts",
    "max_cuts",
    "first",
    "has_sink",
    "has_length",
    "has_extra_length",
    "topk",
    "num_slots",
    "extra_topk",
    "extra_num_slots",
    "stride_indices_b",
    "stride_indices_s",
    "stride_extra_indices_b",
    "stride_extra_indices_s",
    "stride_length_b",
    "stride_length_s",
    "stride_extra_length_b",
    "stride_extra_length_s",
    "stride_lse_b",
    "stride_lse_h",
    "stride_lse_s",
)
def sparse_decode_kernel(
    q: tl.tensor,
    cache: tl.tensor,
    indices: tl.tensor,
    length: tl.tensor,
    extra_cache: tl.tensor,
    extra_indices: tl.tensor,
    extra_length: tl.tensor,
    schedule: tl.tensor,
    attn_sink: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    scale_log2: tl.tensor,
    b: tl.tensor,
    h_q: tl.tensor,
    num_head_tiles: tl.tensor,
    num_parts: tl.tensor,
    max_cuts: tl.tensor,
    first: tl.tensor,
    has_sink: tl.tensor,
    has_length: tl.tensor,
    has_extra_length: tl.tensor,
    topk: tl.tensor,
    num_slots: tl.tensor,
    extra_topk: tl.tensor,
    extra_num_slots: tl.tensor,
    stride_q_b: tl.tensor,
    stride_q_s: tl.tensor,
    stride_q_h: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    stride_extra_page: tl.tensor,
    stride_extra_token: tl.tensor,
    stride_indices_b: tl.tensor,
    stride_indices_s: tl.tensor,
    stride_extra_indices_b: tl.tensor,
    stride_extra_indices_s: tl.tensor,
    stride_length_b: tl.tensor,
    stride_length_s: tl.tensor,
    stride_extra_length_b: tl.tensor,
    stride_extra_length_s: tl.tensor,
    stride_out_b: tl.tensor,
    stride_out_s: tl.tensor,
    stride_out_h: tl.tensor,
    stride_lse_b: tl.tensor,
    stride_lse_h: tl.tensor,
    stride_lse_s: tl.tensor,
    PAGE: tl.constexpr,
    EXTRA_PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    EXTRA_FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROPE: tl.constexpr,
    FIXED_CUTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid `(num_head_tiles * s_q, parts)`: head tiles fastest, so that programs that read the same keys start
    together. MODEL1's RoPE part is multiplied by itself.

    With FIXED_CUTS part p is piece `p % max_cuts` of request `first + p // max_cuts`, and `schedule` is not read.
    Partial results are float32 `[parts * 2, s_q, num_head_tiles * BLOCK_M, 512]` (with FIXED_CUTS one per part).
    """
    TAIL: tl.constexpr = FORMAT == MODEL1 and BLOCK_M < 64
    head_tile = tl.program_id(0) % num_head_tiles
    token = tl.program_id(0) // num_head_tiles
    part = tl.program_id(1)
    head = head_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = head < h_q
    column = tl.arange(0, D_V)[None, :]
    # A sink of -inf changes nothing.
    sink = tl.load(attn_sink + head, mask=exists & has_sink, other=float("-inf"))
    if FIXED_CUTS:
        begin_request = first + part // max_cuts
        end_request = begin_request
    else:
        begin_request = tl.load(schedule + part * 8)
        end_request = tl.minimum(tl.load(schedule + part * 8 + 1), b - 1)
        end_request = tl.where(begin_request < b, end_request, -1)

    for request in range(begin_request, end_request + 1):
        lanes = lanes_of(length, has_length, request, token, stride_length_b, stride_length_s, topk)
        blocks = tl.maximum(ceil_div(lanes, SCHEDULE_BLOCK), 1)
        all_blocks = blocks
        extra_lanes = 0
        if EXTRA_FORMAT != NONE:
            extra_lanes = lanes_of(
                extra_length,
                has_extra_length,
                request,
                token,
                stride_extra_length_b,
                stride_extra_length_s,
                extra_topk,
            )
            all_blocks = blocks + ceil_div(extra_lanes, SCHEDULE_BLOCK)
        if FIXED_CUTS:
            cut_blocks = fixed_cut_blocks(all_blocks, max_cuts)
            begin = (part % max_cuts) * cut_blocks
            end = begin + cut_blocks
            partial = tl.where(cut_blocks < all_blocks, part, WHOLE)
            partial = tl.where(begin < all_blocks, partial, NOTHING)
        else:
            begin, end, partial = piece_of(schedule, part, num_parts, request, begin_request, end_request)
        end = tl.minimum(end, all_blocks)

        q_rows = q + wide(request) * stride_q_b + wide(token) * stride_q_s + head.to(tl.int64) * stride_q_h
        q_v = tl.load(q_rows[:, None] + column, mask=exists[:, None], other=0.0)
        q_rope = q_v
        if ROPE or TAIL:
            rope_column = (D_V - D_ROPE if TAIL else D_V) + tl.arange(0, D_ROPE)[None, :]
            q_rope = tl.load(q_rows[:, None] + rope_column, mask=exists[:, None], other=0.0)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, D_V], tl.float32)
        acc_rope = row_max
        if TAIL:
            acc_rope = tl.zeros([BLOCK_M, D_ROPE], tl.float32)
        acc, acc_rope, row_max, row_sum = attend_lanes(
            acc,
            acc_rope,
            row_max,
            row_sum,
            q_v,
            q_rope,
            scale_log2,
            indices + wide(request) * stride_indices_b + wide(token) * stride_indices_s,
            begin * SCHEDULE_BLOCK,
            tl.minimum(tl.minimum(end, blocks) * SCHEDULE_BLOCK, lanes),
            cache,
            num_slots,
            stride_page,
            stride_token,
            PAGE,
            FORMAT,
            HARDWARE,
            ROPE or TAIL,
            TAIL,
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
                extra_indices + wide(request) * stride_extra_indices_b + wide(token) * stride_extra_indices_s,
                tl.maximum(begin - blocks, 0) * SCHEDULE_BLOCK,
                tl.minimum((end - blocks) * SCHEDULE_BLOCK, extra_lanes),
                extra_cache,
                extra_num_slots,
                stride_extra_page,
                stride_extra_token,
                EXTRA_PAGE,
                EXTRA_FORMAT,
                HARDWARE,
                ROPE or TAIL,
                TAIL,
                BLOCK_M,
                BLOCK_N,
            )
        if partial == WHOLE:
            out_rows = (
                out + wide(request) * stride_out_b + wide(token) * stride_out_s + head.to(tl.int64) * stride_out_h
            )
            lse_rows = (
                lse + wide(request) * stride_lse_b + wide(token) * stride_lse_s + head.to(tl.int64) * stride_lse_h
            )
            store_result(out_rows, lse_rows, acc, acc_rope, row_max, row_sum, sink, exists, True, TAIL)
        elif partial != NOTHING:
            tile = wide(partial) * tl.num_programs(0) + tl.program_id(0)
            store_partial(partial_out, partial_lse, tile, acc, acc_rope, row_max, row_sum, exists, BLOCK_M, TAIL)


@jit_for_any_value(
    "s_q",
    "topk",
    "num_slots",
    "has_length",
    "stride_indices_b",
    "stride_indices_s",
    "stride_length_b",
    "stride_length_s",
)
def compact_kernel(
    indices: tl.tensor,
    length: tl.tensor,
    compacted: tl.tensor,
    count: tl.tensor,
    s_q: tl.tensor,
    topk: tl.tensor,
    num_slots: tl.tensor,
    has_length: tl.tensor,
    stride_indices_b: tl.tensor,
    stride_indices_s: tl.tensor,
    stride_length_b: tl.tensor,
    stride_length_s: tl.tensor,
    CHUNK: tl.constexpr,
) -> None:
    """Grid `(b * s_q,)`: the valid indices of one query, in their order and without gaps, and how many there are.

    `compacted` `[b, s_q, topk]` and `count` `[b, s_q]` are contiguous. What lies behind the valid ones is not written.
    """
    query = tl.program_id(0)
    request = query // s_q
    token = query % s_q
    lanes = lanes_of(length, has_length, request, token, stride_length_b, stride_length_s, topk)
    row = indices + wide(request) * stride_indices_b + wide(token) * stride_indices_s
    found = tl.full((), 0, tl.int32)
    for start in range(0, lanes, CHUNK):
        index = load_lanes(row, start, lanes, CHUNK)
        valid = (index >= 0) & (index < num_slots)
        place = found + tl.cumsum(valid.to(tl.int32), 0) - 1
        tl.store(compacted + wide(query) * topk + place, index, mask=valid)
        found += tl.sum(valid.to(tl.int32), 0)
    tl.store(count + query, found)


# ---- The launch.


@dataclass(frozen=True)
class Keys:
    """One cache, and the lanes of it that each query sees."""

    cache: Tensor
    """`[num_blocks, page, 1, d_qk]` bfloat16, or `[num_blocks, page, 1, bytes]` of a one-byte type."""
    format: Format
    indices: Tensor
    """int32 `[b, s_q, topk]`: `page_index * page + offset`; what is not a slot is masked."""
    length: Tensor | None = None
    """int32 `[b]` or `[b, s_q]`: lanes at and past it are not read."""

    @staticmethod
    def of(cache: Tensor, kv_format: str, indices: Tensor, length: Tensor | None) -> "Keys":
        """From an operator's arguments; `kv_format` is the name of a `KVFormat`."""
        cache = as_cache(cache)
        return Keys(cache, Format.of(kv_format, cache.shape[-1]), indices, length)

    def arguments(self) -> tuple[tuple[Any, ...], tuple[int, int]]:
        """(cache, indices, length) and (topk, slots) for the kernel."""
        cache = self.cache if self.cache.dtype == torch.bfloat16 else self.cache.view(torch.uint8)
        length = self.indices if self.length is None else self.length
        return (cache, self.indices, length), (self.indices.shape[2], self.cache.shape[0] * self.cache.shape[1])

    def tokens(self, some: slice) -> "Keys":
        """The same cache for some of the queries of each request."""
        length = self.length
        if length is not None and length.dim() == 2:
            length = length[:, some]
        return replace(self, indices=self.indices[:, some], length=length)

    def length_strides(self) -> tuple[int, int]:
        """Strides of `length` by request and by query."""
        if self.length is None:
            return 0, 0
        return self.length.stride(0), self.length.stride(1) if self.length.dim() == 2 else 0


def kinds_of(caches: Iterable[Keys]) -> Iterator[object]:
    """What the choice of a tile depends on, of each cache: its format, and how many indices there are."""
    for keys in caches:
        yield keys.format.name
        yield tuning.size_class(keys.indices.shape[2])


@dataclass(frozen=True)
class Call:
    """The tensors and numbers of one call, checked. Written: `out` `[b, s_q, h_q, 512]` and `lse` `[b, h_q, s_q]`."""

    q: Tensor
    keys: Keys
    extra: Keys | None
    attn_sink: Tensor | None
    softmax_scale: float
    out: Tensor
    lse: Tensor

    def caches(self) -> tuple[Keys, ...]:
        """The keys of one cache or of two."""
        return (self.keys,) if self.extra is None else (self.keys, self.extra)

    def tokens(self, begin: int, end: int) -> "Call":
        """The same call for some of the queries of each request."""
        if begin == 0 and end == self.q.shape[1]:
            return self
        some = slice(begin, end)
        return replace(
            self,
            q=self.q[:, some],
            keys=self.keys.tokens(some),
            extra=None if self.extra is None else self.extra.tokens(some),
            out=self.out[:, some],
            lse=self.lse[:, :, some],
        )


def sparse_decode(call: Call, schedule: Tensor, num_splits: Tensor, tile: Tile | None = None) -> None:
    """Decode as a schedule says: int32 `[parts, 8]` and `[b + 1]`, made for these lengths or for others."""
    if call.q.shape[0] == 0:
        return
    parts = schedule.shape[0]
    if tile is None:
        b, s_q, h_q, _ = call.q.shape
        kind = ("sparse_decode", *kinds_of(call.caches()), h_q, tuning.size_class(b * s_q))
        tiles = _tiles(call)
        tile = tuning.choose(kind, tiles, call.q.device, lambda tile: sparse_decode(call, schedule, num_splits, tile))
    partials = _partials(call, tile, 2 * parts) if parts > 1 else (call.lse, call.lse)
    with device_of(call.q):
        _launch(call, tile, partials, parts, schedule=schedule)
        if parts > 1:
            _join(call, tile, partials, parts, schedule=schedule, num_splits=num_splits)


def sparse_decode_batch_invariant(call: Call, tile: Tile | None = None) -> None:
    """Decode with cuts that depend on each query's own keys, in as many rounds as bounded memory needs.

    Its own keys are those of its valid indices: where they stand among others makes no difference.
    """
    b, s_q, h_q, _ = call.q.shape
    if b == 0:
        return
    tile = tile or _tiles(call)[0]
    head_tiles = -(-h_q // tile.block_m)
    limit = 2 * Gpu.of(call.q.device).num_sms
    # Lists too short for so many pieces do not get them anyway: the cuts are the same.
    pieces = -(-sum(-(-keys.indices.shape[2] // SCHEDULE_BLOCK.value) for keys in call.caches()) // LEAST_CUT.value)
    max_cuts = max(1, min(limit // head_tiles, MAX_CUTS, pieces))
    tokens, at_once = s_q, MAX_GRID_Y
    if max_cuts > 1:
        tokens = max(1, min(s_q, limit // (head_tiles * max_cuts)))
        at_once = max(1, limit // (head_tiles * max_cuts * tokens))
    with device_of(call.q):
        call = replace(call, keys=_compacted(call.keys), extra=None if call.extra is None else _compacted(call.extra))
        blocks = _blocks(call) if max_cuts > 1 else None
        for begin in range(0, s_q, tokens):
            some = call.tokens(begin, min(begin + tokens, s_q))
            partials = _partials(some, tile, min(at_once, b) * max_cuts) if max_cuts > 1 else (call.lse, call.lse)
            for first in range(0, b, at_once):
                requests = min(at_once, b - first)
                cuts = {"max_cuts": max_cuts, "first": first}
                _launch(some, tile, partials, requests * max_cuts, **cuts)
                if blocks is not None:
                    _join(some, tile, partials, requests, blocks=blocks[:, begin : begin + tokens].contiguous(), **cuts)


def _tiles(call: Call) -> tuple[Tile, ...]:
    in_flight = max(keys.format.in_flight for keys in call.caches())
    return sparse_tiles(Gpu.of(call.q.device), call.q.shape[2], call.q.shape[3], in_flight)


def _compacted(keys: Keys) -> Keys:
    """The same with its valid indices alone; every query with a length of its own."""
    b, s_q, topk = keys.indices.shape
    indices = torch.empty_like(keys.indices, memory_format=torch.contiguous_format)
    count = keys.indices.new_empty((b, s_q))
    (_, *lists), (_, slots) = keys.arguments()
    compact_kernel[(b * s_q,)](
        *lists,
        indices,
        count,
        s_q,
        topk,
        slots,
        keys.length is not None,
        *keys.indices.stride()[:2],
        *keys.length_strides(),
        CHUNK=1024,
        num_warps=4,
        **OPTIONS,
    )
    return replace(keys, indices=indices, length=count)


def _blocks(call: Call) -> Tensor:
    """int32 `[b, s_q]`: blocks of each query of a compacted call, as the kernel counts them."""
    first, *others = (blocks_of(keys.length) for keys in call.caches() if keys.length is not None)
    return sum(others, first.clamp(min=1)).to(torch.int32)


def _partials(call: Call, tile: Tile, count: int) -> tuple[Tensor, Tensor]:
    """Memory for `count` partial results of all rows: values, and a logarithm for each row."""
    rows = count * call.q.shape[1] * _padded_heads(call, tile)
    new = call.lse.new_empty
    return new((rows, HEAD_DIM_V)), new((rows,))


def _padded_heads(call: Call, tile: Tile) -> int:
    return -(-call.q.shape[2] // tile.block_m) * tile.block_m


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
    keys, extra = call.keys, call.extra or call.keys
    tensors, sizes = keys.arguments()
    extra_tensors, extra_sizes = extra.arguments()
    page, *strides = pages_of(keys.cache, keys.format)
    extra_page, *extra_strides = pages_of(extra.cache, extra.format)
    head_tiles = -(-h_q // tile.block_m)
    sparse_decode_kernel[(head_tiles * s_q, parts)](
        call.q,
        *tensors,
        *extra_tensors,
        keys.indices if schedule is None else schedule,
        call.lse if call.attn_sink is None else call.attn_sink,
        call.out,
        call.lse,
        *partials,
        float(call.softmax_scale * LOG2E.value),
        b,
        h_q,
        head_tiles,
        parts,
        max_cuts,
        first,
        call.attn_sink is not None,
        keys.length is not None,
        extra.length is not None,
        *sizes,
        *extra_sizes,
        *call.q.stride()[:3],
        *strides,
        *extra_strides,
        *keys.indices.stride()[:2],
        *extra.indices.stride()[:2],
        *keys.length_strides(),
        *extra.length_strides(),
        *call.out.stride()[:3],
        *call.lse.stride(),
        PAGE=page,
        EXTRA_PAGE=extra_page,
        FORMAT=int(keys.format),
        EXTRA_FORMAT=int(Format.NONE if call.extra is None else extra.format),
        HARDWARE=converts_fp8(Gpu.of(call.q.device)),
        ROPE=d_qk > HEAD_DIM_V,
        FIXED_CUTS=schedule is None,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **OPTIONS,
    )


def _join(
    call: Call,
    tile: Tile,
    partials: tuple[Tensor, Tensor],
    candidates: int,
    blocks: Tensor | None = None,
    **cuts: Any,
) -> None:
    heads = _padded_heads(call, tile)
    launch_combine(
        partials,
        call.out,
        call.lse,
        call.attn_sink,
        candidates,
        head_group=call.q.shape[2],
        partial_rows=call.q.shape[1] * heads,
        rows_per_group=0,
        rows_per_token=heads,
        lengths=call.lse[0, 0] if blocks is None else blocks,
        **cuts,
    )
