"""The split-KV schedule: which part of the machine works on which blocks of which request.

A schedule is a pair of int32 tensors. `tile_scheduler_metadata` `[num_sm_parts, 8]` has one row per part:
begin_request, end_request (inclusive), begin_block, end_block (exclusive, within end_request), begin_split,
first_request_is_split, last_request_is_split, 0. Blocks are 64 keys; a request of length n has `max(1, ceil(n / 64))`
of them, so that a request without keys still has a part that writes its result. A sparse request has
`max(1, ceil(topk_length / 64))` blocks of the primary cache, then `ceil(extra_topk_length / 64)` of the extra one. Rows
tile the requests in order; a part without work begins at request b. `num_splits` `[b + 1]` is the running number of
splits before each request.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flash_mla import backends, errors, problem, problem_sparse
from flash_mla.backends.reference_schedule import blocks_per_request, plan_blocks
from flash_mla.backends.triton.config import Gpu


@dataclass
class FlashMLASchedMeta:
    """A schedule that the first decode call makes and later calls reuse.

    Share one object between calls of the same shape (the layers of a model, in one step), and make a new one when the
    lengths change. A plan that has gone stale still gives right answers, only less evenly divided. Setting both tensors
    to None makes the next call plan again, whatever `have_initialized` says.
    """

    @dataclass
    class Config:
        """The shapes of the call that a schedule was made for."""

        b: int
        s_q: int
        h_q: int
        page_block_size: int | None
        h_k: int
        causal: bool
        is_fp8_kvcache: bool
        topk: int | None = None
        extra_page_block_size: int | None = None
        extra_topk: int | None = None

    have_initialized: bool = False
    config: Config | None = None
    tile_scheduler_metadata: Tensor | None = None
    """int32 `[num_sm_parts, 8]`."""
    num_splits: Tensor | None = None
    """int32 `[b + 1]`, cumulative."""

    def check(self, call: tuple[Any, ...]) -> None:
        """Raise `ValueError` when the schedule was made for other shapes than these, the fields of a `Config`.

        Runs on every call.
        """
        config = self.config
        if config is None or call == (
            config.b,
            config.s_q,
            config.h_q,
            config.page_block_size,
            config.h_k,
            config.causal,
            config.is_fp8_kvcache,
            config.topk,
            config.extra_page_block_size,
            config.extra_topk,
        ):
            return
        for field, given in vars(FlashMLASchedMeta.Config(*call)).items():
            planned = getattr(config, field)
            if planned != given:
                text = errors.wanted(f"tile_scheduler_metadata.config.{field}", f"{planned} (as planned)", given)
                raise ValueError(f"{text}; use a new FlashMLASchedMeta for each shape")

    def adopt(self, rows: Tensor, num_splits: Tensor, call: tuple[Any, ...]) -> None:
        """Keep a schedule, for calls of these shapes."""
        self.tile_scheduler_metadata, self.num_splits = rows, num_splits
        self.config = FlashMLASchedMeta.Config(*call)
        self.have_initialized = True


def get_mla_metadata(*_args: Any, **_kwargs: Any) -> tuple[FlashMLASchedMeta, None]:
    """A schedule to be planned by the first decode call that gets it.

    Any arguments are accepted and ignored, so that callers of the older form
    `get_mla_metadata(cache_seqlens, num_q_tokens_per_head_k, num_heads_k, ...)` need no change.

    Returns:
        `(FlashMLASchedMeta(), None)`: pass both on as `tile_scheduler_metadata` and `num_splits`.
    """
    return FlashMLASchedMeta(), None


def get_mla_decoding_metadata(
    seqlens_k: Tensor,
    num_q_tokens_per_head_k: int,
    h_k: int,
    h_q: int | None = None,
    is_fp8_kvcache: bool = False,
    topk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Plan decode now and return the schedule as tensors, for callers who copy it into fixed buffers.

    Runs on the device of `seqlens_k` without synchronising with the host; can be captured in a CUDA graph.

    Args:
        seqlens_k: int32 `[b]`, keys per request.
        num_q_tokens_per_head_k: `s_q * h_q / h_k`, query rows that share a KV head.
        h_k: KV heads.
        h_q: query heads; None stands for one query per request (`num_q_tokens_per_head_k * h_k` heads).
        is_fp8_kvcache: does not change the schedule.
        topk: sparse decode: every request attends to so many keys of one cache, and the lengths in seqlens_k do not
            count.

    Returns:
        `tile_scheduler_metadata` int32 `[num_sm_parts, 8]`, at most a row for each multiprocessor of the GPU, and
        `num_splits` int32 `[b + 1]`.

    Raises:
        ValueError, TypeError: naming the wrong argument.
    """
    del is_fp8_kvcache
    s_q, h_q = _split_query_rows(num_q_tokens_per_head_k, h_k, h_q)
    problem.check_plan(seqlens_k, s_q, h_q, h_k)
    op: str = "plan_dense_decode"
    inputs: tuple[Any, ...] = (seqlens_k, s_q, h_q, h_k)
    if topk is not None:
        op, inputs = "plan_sparse_decode", (seqlens_k, None, None, s_q, h_q, topk, 0)
        problem_sparse.check_sparse_plan(*inputs)
    try:
        rows, num_splits = getattr(backends.active, op)(*inputs)
    except Exception as error:
        operators = backends.behind_cuda(errors.from_native(error), seqlens_k)
        rows, num_splits = getattr(operators, op)(*inputs)
    most = _most_rows(seqlens_k)
    if rows.shape[0] > most:
        blocks = blocks_per_request(seqlens_k if topk is None else torch.full_like(seqlens_k, topk))
        rows, num_splits = plan_blocks(blocks, most)
    return rows, num_splits


def _most_rows(seqlens_k: Tensor) -> int:
    """Rows that engines have room for: one for each multiprocessor. Triton's own plans may have two."""
    return Gpu.of(seqlens_k.device).num_sms if seqlens_k.is_cuda else problem.MAX_PARTS


def _split_query_rows(num_q_tokens_per_head_k: int, h_k: int, h_q: int | None) -> tuple[int, int]:
    """`(s_q, h_q)` of a call that has `num_q_tokens_per_head_k` query rows for each of `h_k` KV heads."""
    rows = num_q_tokens_per_head_k * h_k
    if h_q is None:
        return 1, rows
    if h_q < 1 or rows % h_q != 0:
        wanted = f"a positive divisor of num_q_tokens_per_head_k * h_k = {rows}"
        raise ValueError(errors.wanted("h_q", wanted, h_q))
    return rows // h_q, h_q


class Piece(NamedTuple):
    """One part's share of one request: blocks `[begin_block, end_block)`, written as split number `split`."""

    part: int
    request: int
    begin_block: int
    end_block: int
    split: int
    is_split: bool


def pieces(tile_scheduler_metadata: Tensor, num_splits: Tensor, cache_seqlens: Tensor) -> list[Piece]:
    """What a schedule makes each part do, for lengths that it was planned for: the meaning of the rows, spelled out.

    Synchronises with the host. `split` counts from 0 within its request.
    """
    blocks = blocks_per_request(cache_seqlens).tolist()
    b = len(blocks)
    found = []
    for part, row in enumerate(tile_scheduler_metadata.tolist()):
        begin, end, begin_block, end_block, begin_split, first_is_split, last_is_split, _ = row
        if begin >= b:
            continue
        for request in range(begin, end + 1):
            first, last = request == begin, request == end
            is_split = bool(first and first_is_split) or bool(last and last_is_split)
            found.append(
                Piece(
                    part,
                    request,
                    begin_block if first else 0,
                    end_block if last else blocks[request],
                    begin_split if first else 0,
                    is_split,
                )
            )
    return found
