"""The split-KV planner in PyTorch operators: the reference for the device-side planner, on any device.

`flash_mla.schedule` describes the rows.
"""

import torch
from torch import Tensor

from flash_mla.problem import BLOCK_KEYS, REFERENCE_PARTS, ROW_FIELDS


def blocks_per_request(cache_seqlens: Tensor) -> Tensor:
    """int64 `[b]`: schedule blocks of each request, `max(1, ceil(length / 64))`."""
    return blocks_of(cache_seqlens).clamp_(min=1)


def blocks_of(lengths: Tensor) -> Tensor:
    """int64 `[b]`: `ceil(length / 64)`."""
    return (lengths.to(torch.int64) + (BLOCK_KEYS - 1)).div(BLOCK_KEYS, rounding_mode="floor")


def plan_in_torch(cache_seqlens: Tensor, num_parts: int = REFERENCE_PARTS) -> tuple[Tensor, Tensor]:
    """Plan with PyTorch operators, on any device: cut the sequence of all blocks into equal pieces.

    Args:
        cache_seqlens: int32 `[b]`.
        num_parts: rows to make; parts beyond the number of blocks stay without work.

    Returns:
        `tile_scheduler_metadata` int32 `[num_parts, 8]` and `num_splits` int32 `[b + 1]`.
    """
    return plan_blocks(blocks_per_request(cache_seqlens), num_parts)


def plan_blocks(blocks: Tensor, num_parts: int = REFERENCE_PARTS) -> tuple[Tensor, Tensor]:
    """`plan_in_torch` for requests of `blocks` int64 `[b]` blocks, each at least 1."""
    b, device = blocks.shape[0], blocks.device
    rows = torch.zeros((num_parts, ROW_FIELDS), dtype=torch.int64, device=device)
    num_splits = torch.zeros(b + 1, dtype=torch.int32, device=device)
    if b == 0:
        return rows.to(torch.int32), num_splits
    ends = blocks.cumsum(0)
    starts = ends - blocks
    total = ends[-1]
    busy = total.clamp(max=num_parts)
    part = torch.arange(num_parts + 1, device=device)
    bounds = torch.minimum(part, busy) * total // busy

    first_part = torch.searchsorted(bounds[1:].contiguous(), starts, right=True)
    last_part = torch.searchsorted(bounds[1:].contiguous(), ends - 1, right=True)
    splits = last_part - first_part + 1
    num_splits[1:] = splits.cumsum(0)

    begin = torch.searchsorted(ends, bounds[:-1].contiguous(), right=True)
    idle = begin == b
    begin = begin.clamp(max=b - 1)
    end = torch.searchsorted(ends, bounds[1:] - 1, right=True)
    rows[:, 0] = begin
    rows[:, 1] = end
    rows[:, 2] = bounds[:-1] - starts[begin]
    rows[:, 3] = bounds[1:] - starts[end]
    rows[:, 4] = part[:-1] - first_part[begin]
    rows[:, 5] = splits[begin] > 1
    rows[:, 6] = splits[end] > 1
    rows[idle] = 0
    rows[:, 0].masked_fill_(idle, b)
    return rows.to(torch.int32), num_splits
