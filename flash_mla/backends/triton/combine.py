"""Joining the partial results of requests that the schedule split."""

from typing import Any

import triton.language as tl

from flash_mla.backends.triton.language import (
    D_V,
    SCHEDULE_BLOCK,
    ceil_div,
    final_factor,
    fixed_cut_blocks,
    jit,
    jit_for_any_value,
    natural_lse,
    rounded,
    wide,
)


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


@jit_for_any_value("b", "num_rows", "h_q", "group", "partial_rows", "max_keys", "num_parts", "max_cuts", "first")
def combine_kernel(
    cache_seqlens: tl.tensor,
    schedule: tl.tensor,
    num_splits: tl.tensor,
    attn_sink: tl.tensor,
    partial_out: tl.tensor,
    partial_stats: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    b: tl.tensor,
    num_rows: tl.tensor,
    h_q: tl.tensor,
    group: tl.tensor,
    partial_rows: tl.tensor,
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
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """Grid `(s_q * h_q / ROWS, parts)`, or `(..., requests)` with FIXED_CUTS. A program joins some rows of the request
    that begins in its part, in the order of the splits: the bits do not depend on which part came last.

    Every partial result was written, if only with zeros: a piece without a key that a row sees has sum 0.

    `partial_rows`: rows of a partial result, `h_kv * num_row_tiles * BLOCK_M`.
    """
    number = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = number // h_q
    head = number % h_q
    exists = number < num_rows
    index = tl.program_id(1)
    if FIXED_CUTS:
        request = first + index
        seqlen = tl.minimum(tl.maximum(tl.load(cache_seqlens + request), 0), max_keys)
        num_blocks = tl.maximum(ceil_div(seqlen, SCHEDULE_BLOCK), 1)
        cut_blocks = fixed_cut_blocks(num_blocks, max_cuts)
        count = tl.where(cut_blocks < num_blocks, ceil_div(num_blocks, cut_blocks), 0)
        first_partial = index * max_cuts
        second_partial = first_partial + 1
        step = 1
    else:
        request, count, first_partial = split_request(schedule, num_splits, index, num_parts, b)
        second_partial = 2 * index + 2
        step = 2
    if count > 0:
        row = (head // group) * (partial_rows // (h_q // group)) + token * group + head % group
        splits = tl.where(exists, count, 0)
        columns = tl.arange(0, D_V)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, D_V], tl.float32)
        for base in range(0, count, SPLITS):
            for ahead in tl.static_range(SPLITS):  # unrolled, to have several loads in flight
                split = base + ahead
                partial = tl.where(split == 0, first_partial, second_partial + (split - 1) * step)
                at = partial.to(tl.int64) * partial_rows + row
                load = split < splits
                part_max = tl.load(partial_stats + 2 * at, mask=load, other=float("-inf"))
                part_sum = tl.load(partial_stats + 2 * at + 1, mask=load, other=0.0)
                values = tl.load(partial_out + at[:, None] * D_V + columns[None, :], mask=load[:, None], other=0.0)
                new_max = tl.maximum(row_max, part_max)
                origin = tl.where(new_max == float("-inf"), 0.0, new_max)
                weight = tl.exp2(part_max - origin)
                rescale = tl.exp2(row_max - origin)
                row_sum = row_sum * rescale + part_sum * weight
                acc = acc * rescale[:, None] + values * weight[:, None]
                row_max = new_max
        sink = tl.zeros([ROWS], tl.float32)
        if HAS_SINK:
            sink = tl.load(attn_sink + head, mask=exists, other=0.0)
        factor = final_factor(row_max, row_sum, sink, HAS_SINK)[:, None]
        result = tl.where(factor == 0.0, 0.0, acc * factor)
        request64 = wide(request)
        out_row = out + request64 * stride_out_b + token.to(tl.int64) * stride_out_s + head.to(tl.int64) * stride_out_h
        tl.store(out_row[:, None] + columns[None, :], rounded(result, out.dtype.element_ty), mask=exists[:, None])
        lse_at = lse + request64 * stride_lse_b + token.to(tl.int64) * stride_lse_s + head.to(tl.int64) * stride_lse_h
        tl.store(lse_at, natural_lse(row_max, row_sum), mask=exists)
