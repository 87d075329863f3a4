"""Inputs of attention calls as an engine would have them, with traps: everything that may not be read is NaN or
garbage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from flash_mla.backends import reference
from flash_mla.problem import BLOCK_KEYS, HEAD_DIM_V, ROW_FIELDS, default_softmax_scale

GARBAGE_PAGES = (-1, 2**31 - 1, -(2**31), 123456789)


@dataclass
class DenseDecodeInputs:
    """The tensors of one dense decode call."""

    q: Tensor
    k_cache: Tensor
    block_table: Tensor
    cache_seqlens: Tensor
    causal: bool = False
    attn_sink: Tensor | None = None
    softmax_scale: float | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments for `flash_mla_with_kvcache`, without the schedule."""
        return {
            "q": self.q,
            "k_cache": self.k_cache,
            "block_table": self.block_table,
            "cache_seqlens": self.cache_seqlens,
            "head_dim_v": HEAD_DIM_V,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "attn_sink": self.attn_sink,
        }

    def rows(self, requests: slice) -> "DenseDecodeInputs":
        """The same call for some of the requests, over the same cache."""
        return DenseDecodeInputs(
            self.q[requests],
            self.k_cache,
            self.block_table[requests],
            self.cache_seqlens[requests].contiguous(),
            self.causal,
            self.attn_sink,
            self.softmax_scale,
        )


def make_dense_decode_inputs(
    lengths: Sequence[int],
    *,
    s_q: int = 1,
    h_q: int = 16,
    h_kv: int = 1,
    d_qk: int = 576,
    page: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    causal: bool = False,
    sink: bool = False,
    seed: int = 0,
    q_layout: Literal["contiguous", "strided"] = "contiguous",
    cache_layout: Literal["contiguous", "interleaved"] = "contiguous",
    spare_pages: int = 1,
    spread: float = 1.0,
) -> DenseDecodeInputs:
    """A paged cache in random page order, with NaN in every slot that no length reaches.

    Args:
        lengths: keys of each request.
        s_q, h_q, h_kv, d_qk, page, dtype, device, causal: shape of the call.
        sink: add an attention sink.
        seed: of the random values.
        q_layout: "strided" cuts q out of a larger tensor of NaN.
        cache_layout: "interleaved" makes the pages of the cache alternate with those of another pool (of NaN) in one
            buffer.
        spare_pages: pages that no request uses.
        spread: standard deviation of the scaled scores, roughly; beyond 3 few keys take all the weight.

    Returns:
        The tensors. Block-table entries past a request's length name pages that do not exist.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    b = len(lengths)
    pages_of = [-(-length // page) for length in lengths]
    num_blocks = sum(pages_of) + spare_pages
    order = torch.randperm(num_blocks, generator=generator).to(torch.int32)
    max_blocks = max(pages_of, default=0) + 3
    block_table = torch.tensor(GARBAGE_PAGES, dtype=torch.int32).repeat(b, max_blocks)[:, :max_blocks].contiguous()
    reached = torch.zeros((num_blocks, page), dtype=torch.bool)
    used = 0
    for request, (length, count) in enumerate(zip(lengths, pages_of, strict=True)):
        mine = order[used : used + count]
        block_table[request, :count] = mine
        slots = torch.arange(count * page).view(count, page) < length
        reached[mine.long()] = slots
        used += count

    on_device = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=on_device, device=device, dtype=dtype)

    cache = normal(num_blocks, page, h_kv, d_qk)
    cache.masked_fill_(~reached.to(device)[:, :, None, None], float("nan"))
    if cache_layout == "interleaved":
        pool = torch.full((num_blocks, 2, page, h_kv, d_qk), float("nan"), device=device, dtype=dtype)
        pool[:, 1] = cache
        cache = pool[:, 1]
    q = normal(b, s_q, h_q, d_qk) * spread
    if q_layout == "strided":
        room = torch.full((b, s_q + 1, h_q + 2, d_qk + 64), float("nan"), device=device, dtype=dtype)
        room[:, :s_q, 1 : h_q + 1, :d_qk] = q
        q = room[:, :s_q, 1 : h_q + 1, :d_qk]
    return DenseDecodeInputs(
        q,
        cache,
        block_table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        causal,
        torch.randn(h_q, generator=generator).to(device) * 2 if sink else None,
    )


@dataclass(frozen=True)
class Answer:
    """What a call should give: the truth, and what PyTorch gives with a kernel's dtypes."""

    out: Tensor
    """`compute_dtype`, not rounded, `[b, s_q, h_q, 512]`."""
    lse: Tensor
    """`compute_dtype`, `[b, h_q, s_q]`."""
    emulated_out: Tensor
    """q's dtype."""
    emulated_lse: Tensor
    """float32."""


def expected_dense_decode(inputs: DenseDecodeInputs, compute_dtype: torch.dtype = torch.float64) -> Answer:
    """The right answer, and the emulation that its tolerance comes from.

    The emulation computes in float32 and rounds to q's dtype twice: the probabilities before they meet V, and the
    result.
    """
    scale = inputs.softmax_scale
    arguments: dict[str, Any] = {
        "softmax_scale": default_softmax_scale(inputs.q.shape[-1]) if scale is None else scale,
        "causal": inputs.causal,
        "attn_sink": inputs.attn_sink,
    }
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    out, lse = reference.attend(*tensors, compute_dtype=compute_dtype, **arguments)
    emulated_out, emulated_lse = reference.attend(*tensors, probability_dtype=inputs.q.dtype, **arguments)
    return Answer(out, lse, emulated_out.to(inputs.q.dtype), emulated_lse)


def make_schedule(
    lengths: Sequence[int], cuts: Sequence[int], idle: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Schedule rows as an engine would write them: one part between each two cuts of the sequence of all blocks.

    Args:
        lengths: keys of each request.
        cuts: ascending block numbers, strictly between 0 and the number of all blocks; any cut is legal.
        idle: rows without work to add at the end.
        device: where to put the tensors.

    Returns:
        `tile_scheduler_metadata` int32 `[len(cuts) + 1 + idle, 8]` and `num_splits` int32 `[len(lengths) + 1]`.
    """
    blocks = [max(1, -(-length // BLOCK_KEYS)) for length in lengths]
    owner = [(request, block) for request, count in enumerate(blocks) for block in range(count)]
    bounds = [0, *cuts, len(owner)]
    splits = [0] * len(lengths)
    rows = []
    for start, end in pairwise(bounds):
        (begin_request, begin_block), (end_request, last_block) = owner[start], owner[end - 1]
        rows.append([begin_request, end_request, begin_block, last_block + 1, splits[begin_request], 0, 0, 0])
        for request in range(begin_request, end_request + 1):
            splits[request] += 1
    for row in rows:
        row[5], row[6] = int(splits[row[0]] > 1), int(splits[row[1]] > 1)
    rows += [[len(lengths)] + [0] * (ROW_FIELDS - 1) for _ in range(idle)]
    num_splits = [0]
    for count in splits:
        num_splits.append(num_splits[-1] + count)
    return (
        torch.tensor(rows, dtype=torch.int32, device=device),
        torch.tensor(num_splits, dtype=torch.int32, device=device),
    )
