"""Inputs of a sparse decode shape on a device, FP8 caches made of random bytes. Needs torch alone.

The byte layouts are written down here once more: what is checked with them is not what they were made by.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.inputs import ByRequest, make_generator, normal, reference
from benchmarks.shapes import SparseShape

_PAGE_ALIGNMENT = 576  # MODEL1: engines pad pages to multiples of it
_ROWS_AT_ONCE = 1 << 18
# Stored values of standard deviation 16 times scales from 2^-6 to 2^-2. Powers of two, as engines write them: a peer
# rounds other float32 scales, and then gives another answer.
_STORED = 16.0
_SCALE_EXPONENTS = (-6, -2)


@dataclass
class Selected:
    """One cache for all sets, and what each query token selects from it.

    `pages` uint8 `[blocks, page stride]` is the memory, `cache` `[blocks, page, 1, bytes per token]` e4m3 is how calls
    take it. indices int32 `[sets, b, s_q, topk]`, -1 behind the `counts` of a request; topk_length int32 `[b]` holds
    them where they vary.
    """

    kv_format: str
    page: int
    pages: torch.Tensor
    cache: torch.Tensor
    indices: torch.Tensor
    counts: list[int]
    topk_length: torch.Tensor | None

    def rows(self, index: int, request: int, token: int) -> torch.Tensor:
        """The selected rows `[count, d_qk]` in float32: stored * scale, rounded to bf16 as the formats want it."""
        slots = self.indices[index, request, token, : self.counts[request]].long()
        block, offset = slots // self.page, slots % self.page
        if self.kv_format == "V32":
            return v32_rows(self.pages.unflatten(1, (self.page, 656))[block, offset])
        rows = _model1_rows(self.pages, self.page)[block, offset]
        exponents = _model1_scales(self.pages, self.page)[block, offset][:, :7].float() - 127
        return _values(rows[:, :448], torch.exp2(exponents), rows[:, 448:])


def v32_rows(rows: torch.Tensor) -> torch.Tensor:
    """V32 rows, uint8 `[count, 656]`, as float32 `[count, 576]`."""
    return _values(rows[:, :512], rows[:, 512:528].contiguous().view(torch.float32), rows[:, 528:])


def _values(stored: torch.Tensor, scales: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    numbers = stored.contiguous().view(torch.float8_e4m3fn).float().unflatten(1, (scales.shape[1], -1))
    quantised = (numbers * scales[..., None]).flatten(1).to(torch.bfloat16)
    return torch.cat([quantised, rope.contiguous().view(torch.bfloat16)], dim=1).float()


@dataclass
class SparseInputs(ByRequest):
    """`sets` independent inputs of one shape, with the same lengths: q `[sets, b, s_q, h_q, d_qk]`, sink `[h_q]`."""

    shape: SparseShape
    sets: int
    q: torch.Tensor
    primary: Selected
    extra: Selected | None
    sink: torch.Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Rows that a query token of each request selects."""
        return [first + second for first, second in self.shape.counts()]

    def arguments(self, index: int) -> dict[str, Any]:
        """What a decode call takes by keyword, without the schedule and without what is not there."""
        given: dict[str, Any] = {"indices": self.primary.indices[index], "topk_length": self.primary.topk_length}
        given["attn_sink"] = self.sink
        if self.extra is not None:
            given["extra_k_cache"] = self.extra.cache
            given["extra_indices_in_kvcache"] = self.extra.indices[index]
            given["extra_topk_length"] = self.extra.topk_length
        return {
            "q": self.q[index],
            "k_cache": self.primary.cache,
            "block_table": None,
            "cache_seqlens": None,
            "head_dim_v": self.shape.d_v,
            "is_fp8_kvcache": True,
            **{name: value for name, value in given.items() if value is not None},
        }

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer for one request of one set, by `reference`, each query token over its own rows."""
        outs, lses = [], []
        sides = [side for side in (self.primary, self.extra) if side is not None]
        for token in range(self.shape.s_q):
            keys = torch.cat([side.rows(index, request, token) for side in sides])[:, None]
            q = self.q[index, request, token : token + 1]
            out, lse = reference(q, keys, self.shape.d_v, self.shape.d_qk**-0.5, causal=False)
            if self.sink is not None:
                out *= torch.sigmoid(lse[:, 0] - self.sink)[None, :, None]
            outs.append(out)
            lses.append(lse)
        return torch.cat(outs), torch.cat(lses, dim=1)


def sparse_inputs(shape: SparseShape, device: torch.device, sets: int) -> SparseInputs:
    """Inputs whose selected rows are new memory for every request of every set."""
    generator = make_generator(shape, device)
    counts = shape.counts()
    q = normal((sets, shape.b, shape.s_q, shape.h_q, shape.d_qk), torch.bfloat16, device, generator)
    primary = _select(shape, sets, shape.topk, shape.context, shape.page, [n for n, _ in counts], generator)
    extra = None
    if shape.extra_topk:
        lengths = [n for _, n in counts]
        extra = _select(shape, sets, shape.extra_topk, shape.extra_context, shape.extra_page, lengths, generator)
    sink = normal((shape.h_q,), torch.float32, device, generator) if shape.sink else None
    return SparseInputs(shape, sets, q, primary, extra, sink)


def _select(
    shape: SparseShape, sets: int, topk: int, context: int, page: int, counts: list[int], generator: torch.Generator
) -> Selected:
    """A cache with pages of its own for every request of every set, dealt out at random; of its `context` tokens, each
    query token selects `topk` different ones."""
    device = generator.device
    pages_each = math.ceil(context / page)
    blocks = sets * shape.b * pages_each
    table = torch.randperm(blocks, generator=generator, device=device).view(sets, shape.b, pages_each)
    indices = torch.empty((sets, shape.b, shape.s_q, topk), dtype=torch.int32, device=device)
    for index in range(sets):
        order = torch.rand((shape.b, shape.s_q, context), generator=generator, device=device).argsort(dim=-1)
        at = order[..., :topk]
        block = table[index].gather(1, (at // page).flatten(1)).view(at.shape)
        indices[index] = block * page + at % page
    topk_length = None
    if shape.varied:
        topk_length = torch.tensor(counts, dtype=torch.int32, device=device)
        indices.masked_fill_(torch.arange(topk, device=device) >= topk_length[:, None, None], -1)
    size = shape.format.bytes_per_token
    pages = random_pages(shape.kv_format, blocks, page, generator)
    stride = pages.stride(0)
    cache = pages.as_strided((blocks, page, 1, size), (stride, size, size, 1)).view(torch.float8_e4m3fn)
    return Selected(shape.kv_format, page, pages, cache, indices, counts, topk_length)


def random_pages(kv_format: str, blocks: int, page: int, generator: torch.Generator) -> torch.Tensor:
    """uint8 `[blocks, page stride]`: normal values, random scales, no NaN."""
    device = generator.device
    v32 = kv_format == "V32"
    stride = 656 * page if v32 else math.ceil(584 * page / _PAGE_ALIGNMENT) * _PAGE_ALIGNMENT
    pages = torch.zeros((blocks, stride), dtype=torch.uint8, device=device)
    at_once = max(1, _ROWS_AT_ONCE // page)
    for begin in range(0, blocks, at_once):
        part = pages[begin : begin + at_once]
        count = (part.shape[0], page)
        quantised, groups = (512, 4) if v32 else (448, 7)
        stored = normal((*count, quantised), torch.bfloat16, device, generator).mul_(_STORED)
        values = stored.to(torch.float8_e4m3fn).view(torch.uint8)
        rope = normal((*count, 64), torch.bfloat16, device, generator).view(torch.uint8)
        low, high = _SCALE_EXPONENTS
        exponents = torch.randint(low, high + 1, (*count, groups), generator=generator, device=device)
        if v32:
            rows = part.unflatten(1, (page, 656))
            rows[..., :512] = values
            rows[..., 512:528] = torch.exp2(exponents.float()).view(torch.uint8)
            rows[..., 528:] = rope
        else:
            rows = _model1_rows(part, page)
            rows[..., :448] = values
            rows[..., 448:] = rope
            _model1_scales(part, page)[..., :7] = (exponents + 127).to(torch.uint8)
    return pages


def _model1_rows(pages: torch.Tensor, page: int) -> torch.Tensor:
    """Values and RoPE `[blocks, page, 576]` of MODEL1 pages."""
    return pages[:, : 576 * page].unflatten(1, (page, 576))


def _model1_scales(pages: torch.Tensor, page: int) -> torch.Tensor:
    """Scales and pad bytes `[blocks, page, 8]` of MODEL1 pages."""
    return pages[:, 576 * page : 584 * page].unflatten(1, (page, 8))
