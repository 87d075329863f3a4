"""Joining the partial results of requests that the schedule split."""

from typing import Any

import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton.config import interpreting
from flash_mla.backends.triton.language import (
    D_V,
    SCHEDULE_BLOCK,
    ceil_div,
    fixed_cut_blocks,
    jit,
    jit_for_any_value,
    store_result,
    wide,
)
from flash_mla.backends.triton.launch import OPTIONS

MAX_CUTS = 32
"""The most pieces of one request in the batch-invariant mode."""

INTERPRETED_ROWS = 64
"""Rows that one program joins under the interpreter, where each program costs milliseconds."""


@jit
def split_request(
    schedule: tl.tensor, num_splits: tl.tensor, part: tl.tensor, num_parts: tl.tensor, b: tl.tensor
) -> Any:
    """The request that is split and begins in `part`: its number, its splits (0: there is none), where the first
    partial result lies.

    The others lie at the first place of the parts that follow.
    """
    begin_request = tl.load(schedule + part * 8)
    request = tl.load(schedule + part * 8 + 1)
    begin_block = tl.load(schedule + part * 8 + 2)
    next_request = tl.load(schedule + (part + 1) * 8, mask=part + 1 < num_parts, other=-1)
    only = begin_request == request
    # A request that begins in an earlier part belongs to that one.
    begins_here = (begin_request < b) & (next_request == request) & ((only == 0) | (begin_block == 0))
    before = tl.load(num_splits + request, mask=begins_here, other=0)
    behind = tl.load(num_splits + request + 1, mask=begins_here, other=0)
    count = tl.minimum(behind - before, num_parts - part)
    return request, count, 2 * part + tl.where(only, 0, 1)


@jit_for_any_value(
    "b",
    "s_q",
    "h_q",
    "head_group",
    "partial_rows",
    "rows_per_group",
    "rows_per_token",
    "max_keys",
    "num_parts",
    "max_cuts",
    "first",
)
def combine_kernel(
    lengths: tl.tensor,
    schedule: tl.tensor,
    num_splits: tl.tensor,
    attn_sink: tl.tensor,
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    b: tl.tensor,
    s_q: tl.tensor,
    h_q: tl.tensor,
    head_group: tl.tensor,
    partial_rows: tl.tensor,
    rows_per_group: tl.tensor,
    rows_per_token: tl.tensor,
    max_keys: tl.tensor,
    num_parts: tl.tensor,
    max_cuts: tl.tensor,
    first: tl.tensor,
    stride_out_b: tl.tensor,
    stride_out_s: tl.tensor,
    stride_out_h: tl.tensor,
    stride_lse_b: tl.tensor,
    stride_lse_h: tl.tensor,
    stride_lse_s: tl.tensor,
    HAS_SINK: tl.constexpr,
    FIXED_CUTS: tl.constexpr,
    BLOCKS_GIVEN: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Grid `(s_q * h_q / ROWS, parts)`, or `(..., requests)` with FIXED_CUTS. A program joins some rows of the request
    that begins in its part, in the order of the splits: the bits do not depend on which part came last.

    Every partial result was written: a piece without a key that a row sees holds 0 and the logarithm -inf. With
    FIXED_CUTS `lengths` holds the keys of each request, or with BLOCKS_GIVEN the blocks of each (request, token).
    """
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = number // h_q
    head = number % h_q
    exists = token < s_q
    index = tl.program_id(1)
    if FIXED_CUTS:
        request = first + index
        if BLOCKS_GIVEN:
            num_blocks = tl.load(lengths + wide(request) * s_q + token, mask=exists, other=1)
        else:
            seqlen = tl.minimum(tl.maximum(tl.load(lengths + request), 0), max_keys)
            num_blocks = tl.maximum(ceil_div(seqlen, SCHEDULE_BLOCK), 1) + tl.zeros([ROWS], tl.int32)
        cut_blocks = fixed_cut_blocks(num_blocks, max_cuts)
        splits = tl.where(cut_blocks < num_blocks, ceil_div(num_blocks, cut_blocks), 0)
        first_partial = index * max_cuts
        second_partial = first_partial + 1
        step = 1
    else:
        request, count, first_partial = split_request(schedule, num_splits, index, num_parts, b)
        splits = tl.zeros([ROWS], tl.int32) + count
        second_partial = 2 * index + 2
        step = 2
    splits = tl.where(exists, splits, 0)
    most = tl.max(splits, 0)
    if most > 0:
        row = (head // head_group) * rows_per_group + token * rows_per_token + head % head_group
        columns = tl.arange(0, D_V)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_V], tl.float32)
        for base in range(0, most, SPLITS):
            for ahead in tl.static_range(SPLITS):  # unrolled, to have several loads in flight
                split = base + ahead
                partial = tl.where(split == 0, first_partial, second_partial + (split - 1) * step)
                at = wide(partial) * partial_rows + row
                load = split < splits
                part_lse = tl.load(partial_lse + at, mask=load, other=float("-inf"))
                values = tl.load(partial_out + at[:, None] * D_V + columns[None, :], mask=load[:, None], other=0.0)
                new_max = tl.maximum(row_max, part_lse)
                origin = tl.where(new_max == float("-inf"), 0.0, new_max)
                weight = tl.exp2(part_lse - origin)
                rescale = tl.exp2(row_max - origin)
                row_sum = row_sum * rescale + weight
                acc = acc * rescale[:, None] + values * weight[:, None]
                row_max = new_max
        sink = tl.zeros([ROWS], tl.float32)
        if HAS_SINK:
            sink = tl.load(attn_sink + head, mask=exists, other=0.0)
        token64, head64 = token.to(tl.int64), head.to(tl.int64)
        out_rows = out + wide(request) * stride_out_b + token64 * stride_out_s + head64 * stride_out_h
        lse_rows = lse + wide(request) * stride_lse_b + token64 * stride_lse_s + head64 * stride_lse_h
        store_result(out_rows, lse_rows, acc, row_max, row_max, row_sum, sink, splits > 0, HAS_SINK, False)


def launch_combine(
    partials: tuple[Tensor, Tensor],
    out: Tensor,
    lse: Tensor,
    attn_sink: Tensor | None,
    candidates: int,
    *,
    head_group: int,
    partial_rows: int,
    rows_per_group: int,
    rows_per_token: int,
    lengths: Tensor,
    max_keys: int = 0,
    schedule: Tensor | None = None,
    num_splits: Tensor | None = None,
    max_cuts: int = 1,
    first: int = 0,
) -> None:
    """Join what is split.

    Args:
        partials: attention over pieces `[..., 512]`, and its base-2 logarithms `[...]`.
        out, lse: `[b, s_q, h_q, 512]` and `[b, h_q, s_q]`; requests that are not split are left alone.
        attn_sink: float32 `[h_q]`.
        candidates: parts, each of which may begin a split request, or the requests of a batch-invariant round.
        head_group: query heads of one key head.
        partial_rows, rows_per_group, rows_per_token: rows of a partial result, and of a key head and a token in it.
        lengths: keys of each request, or blocks of each token `[b, s_q]`; read in a batch-invariant round only.
        max_keys: the most keys of a request.
        schedule, num_splits: of a call with a schedule.
        max_cuts, first: of a batch-invariant round: pieces of a request, and the first request.
    """
    b, s_q, h_q, _ = out.shape
    rows = INTERPRETED_ROWS if interpreting() else 1
    combine_kernel[(-(-s_q * h_q // rows), candidates)](
        lengths,
        lengths if schedule is None else schedule,
        lengths if num_splits is None else num_splits,
        lse if attn_sink is None else attn_sink,
        *partials,
        out,
        lse,
        b,
        s_q,
        h_q,
        head_group,
        partial_rows,
        rows_per_group,
        rows_per_token,
        max_keys,
        candidates,
        max_cuts,
        first,
        *out.stride()[:3],
        *lse.stride(),
        HAS_SINK=attn_sink is not None,
        FIXED_CUTS=schedule is None,
        BLOCKS_GIVEN=lengths.dim() == 2,
        ROWS=rows,
        SPLITS=4,
        num_warps=4,
        **OPTIONS,
    )
