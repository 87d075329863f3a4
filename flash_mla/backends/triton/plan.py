"""The split-KV plan, made on the device by one program, without a word from the host.

The blocks of all requests lie one after another on a line, which is cut into equal parts; the last ones may stay empty.
A cut that falls within a few blocks of a request's edge moves there: so short a piece costs more to join than it
balances.
"""

from typing import Any

import triton.language as tl
from torch import Tensor

from flash_mla.backends.reference_schedule import plan_in_torch
from flash_mla.backends.triton.config import MAX_PARTS, interpreting
from flash_mla.backends.triton.language import SCHEDULE_BLOCK, ceil_div, jit, jit_for_any_value
from flash_mla.backends.triton.launch import OPTIONS, device_of
from flash_mla.problem import ROW_FIELDS

MAX_TOLERANCE = 4
"""The most blocks that a cut moves."""

LEAST_PART = 16
"""Blocks of a part, from which on two programs share a multiprocessor. Perf: 64 us instead of 73 (H100, 16 heads, 128
requests of 1,024 keys), which are not cut then.
"""

MAX_REQUESTS = 4096
"""Beyond it one program takes longer than PyTorch's operators, which use the whole machine."""

CHUNK, INTERPRETED_CHUNK = 16, 1024
"""Requests, or parts, at once. Wide tiles take the compiler minutes, narrow ones the interpreter."""


@jit
def load_blocks(cache_seqlens: tl.tensor, start: tl.tensor, b: tl.tensor, REQUESTS: tl.constexpr) -> Any:
    """Blocks of the requests `[start, start + REQUESTS)`: at least one each, and none past the last request."""
    request = start + tl.arange(0, REQUESTS)
    seqlen = tl.load(cache_seqlens + request, mask=request < b, other=0)
    return tl.where(request < b, tl.maximum(ceil_div(tl.maximum(seqlen, 0), SCHEDULE_BLOCK), 1), 0).to(tl.int64)


@jit
def find_cuts(
    cache_seqlens: tl.tensor,
    bounds: tl.tensor,
    tolerance: tl.tensor,
    b: tl.tensor,
    PARTS: tl.constexpr,
    REQUESTS: tl.constexpr,
) -> Any:
    """For each place on the line `[PARTS]` the request and the block where a cut there takes effect.

    The block after a request's last one is the first of the next request.
    """
    before = tl.zeros([PARTS], tl.int32)
    begin = tl.zeros([PARTS], tl.int64)
    size = tl.zeros([PARTS], tl.int64)
    offset = tl.zeros([1], tl.int64)
    for start in range(0, b, REQUESTS):
        blocks = load_blocks(cache_seqlens, start, b, REQUESTS)
        ends = offset + tl.cumsum(blocks, 0)
        exists = blocks > 0
        done = (ends[None, :] <= bounds[:, None]) & exists[None, :]
        before += tl.sum(done.to(tl.int32), 1)
        begin = tl.maximum(begin, tl.max(tl.where(done, ends[None, :], 0), 1))
        # The request in which the bound lies is the first that is not done.
        inside = (done == 0) & exists[None, :] & ((ends - blocks)[None, :] <= bounds[:, None])
        size += tl.sum(tl.where(inside, blocks[None, :], 0), 1)
        offset += tl.sum(blocks, 0)
    block = bounds - begin
    block = tl.where(block <= tolerance, 0, block)
    to_next = (block > 0) & (block >= size - tolerance)
    return before + to_next.to(tl.int32), tl.where(to_next, 0, block)


@jit_for_any_value("b", "num_parts", "few_parts")
def plan_kernel(
    cache_seqlens: tl.tensor,
    schedule: tl.tensor,
    num_splits: tl.tensor,
    b: tl.tensor,
    num_parts: tl.tensor,
    few_parts: tl.tensor,
    MAX_TOLERANCE: tl.constexpr,
    LEAST_PART: tl.constexpr,
    PARTS: tl.constexpr,
    REQUESTS: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """One program. PARTS is a power of two above `num_parts`; REQUESTS and CHUNK parts are looked at at once.

    Only the first `few_parts` are used where all would have less than LEAST_PART blocks each.
    """
    sums = tl.zeros([REQUESTS], tl.int64)
    most = tl.zeros([REQUESTS], tl.int64)
    for start in range(0, b, REQUESTS):
        blocks = load_blocks(cache_seqlens, start, b, REQUESTS)
        sums += blocks
        most = tl.maximum(most, blocks)
    total = tl.sum(sums, 0)
    longest = tl.max(most, 0)
    part = tl.arange(0, PARTS)
    used = tl.where(total < LEAST_PART * num_parts, few_parts, num_parts)
    busy = tl.minimum(total, used)
    # A part is at least 16 times as long as a cut may move.
    tolerance = tl.minimum(total // busy // 16, MAX_TOLERANCE)
    bounds = tl.minimum(part, busy) * total // busy
    # Requests of one length: parts that hold whole ones, or equal pieces of one, where they are hardly longer.
    size = ceil_div(total, used)
    pieces = tl.maximum(longest // size, 1)
    fitting = tl.where(longest < size, ceil_div(size, longest) * longest, ceil_div(longest, pieces))
    fits = (longest * b == total) & (fitting - size <= tolerance)
    bounds = tl.where(fits, tl.minimum(part * fitting, total), bounds)
    begin_request, begin_block = find_cuts(cache_seqlens, bounds, tolerance, b, PARTS, REQUESTS)
    row = schedule + part * 8
    exists = part < num_parts
    works = begin_request < b
    begin_request = tl.where(works, begin_request, b)
    begin_block = tl.where(works, begin_block, 0).to(tl.int32)
    tl.store(row, begin_request, mask=exists)
    tl.store(row + 2, begin_block, mask=exists)
    tl.debug_barrier()  # what follows reads the rows of other parts
    next_request = tl.load(row + 8, mask=part + 1 < num_parts, other=b)
    next_block = tl.load(row + 10, mask=part + 1 < num_parts, other=0)
    # A cut at the start of a request ends the one before.
    end_request = tl.where(next_block == 0, next_request - 1, next_request)
    seqlen = tl.load(cache_seqlens + end_request, mask=works, other=0)
    all_blocks = tl.maximum(ceil_div(tl.maximum(seqlen, 0), SCHEDULE_BLOCK), 1)
    end_block = tl.where(next_block == 0, all_blocks, next_block)
    inside = begin_block > 0
    # Splits of my first request before mine: its first, and one for each cut inside it before my own.
    begin_split = tl.zeros([PARTS], tl.int32)
    for start in range(0, num_parts, CHUNK):
        other = start + tl.arange(0, CHUNK)
        request = tl.load(schedule + other * 8, mask=other < num_parts, other=-1)
        block = tl.load(schedule + other * 8 + 2, mask=other < num_parts, other=0)
        before = (other[None, :] <= part[:, None]) & (request[None, :] == begin_request[:, None])
        begin_split += tl.sum((before & (block > 0)[None, :]).to(tl.int32), 1)
    same = begin_request == end_request
    first_split = inside | (same & (next_block > 0))
    last_split = (next_block > 0) | (same & inside)
    tl.store(row + 1, tl.where(works, end_request, 0), mask=exists)
    tl.store(row + 3, tl.where(works, end_block, 0), mask=exists)
    tl.store(row + 4, tl.where(inside, begin_split, 0), mask=exists)
    tl.store(row + 5, tl.where(works, first_split.to(tl.int32), 0), mask=exists)
    tl.store(row + 6, tl.where(works, last_split.to(tl.int32), 0), mask=exists)
    tl.store(row + 7, tl.zeros([PARTS], tl.int32), mask=exists)

    # A request has one split more than there are cuts inside it.
    tl.store(num_splits, 0)
    for start in range(0, b, REQUESTS):
        request = start + tl.arange(0, REQUESTS)
        cuts = tl.sum(((begin_request[None, :] <= request[:, None]) & inside[None, :]).to(tl.int32), 1)
        tl.store(num_splits + 1 + request, request + 1 + cuts, mask=request < b)


def plan_dense_decode(cache_seqlens: Tensor, num_parts: int, few_parts: int | None = None) -> tuple[Tensor, Tensor]:
    """int32 `[num_parts, 8]` and `[b + 1]` for lengths int32 `[b]`; at most MAX_PARTS parts.

    `few_parts`: how many of them may have work where keys are few, by default all.
    """
    b = cache_seqlens.shape[0]
    num_parts = min(num_parts, MAX_PARTS)
    if b == 0 or b > MAX_REQUESTS:
        return plan_in_torch(cache_seqlens, num_parts)
    rows = cache_seqlens.new_empty((num_parts, ROW_FIELDS))
    num_splits = cache_seqlens.new_empty((b + 1,))
    chunk = INTERPRETED_CHUNK if interpreting() else CHUNK
    with device_of(cache_seqlens):
        plan_kernel[(1,)](
            cache_seqlens,
            rows,
            num_splits,
            b,
            num_parts,
            num_parts if few_parts is None else few_parts,
            MAX_TOLERANCE=MAX_TOLERANCE,
            LEAST_PART=LEAST_PART,
            PARTS=1 << num_parts.bit_length(),
            REQUESTS=chunk,
            CHUNK=chunk,
            num_warps=8,
            **OPTIONS,
        )
    return rows, num_splits
