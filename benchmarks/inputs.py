"""Inputs of a dense shape on a device, and the check of an answer against plain PyTorch in float32.

Needs torch alone, as `sparse_inputs` does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.shapes import AnyShape, Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# 16-bit operands and probabilities leave 1e-3 to 5e-3 against a float32 reference.
MAX_RELATIVE_ERROR = 1e-2
MAX_LSE_ERROR = 1e-2


class Checked(Protocol):
    """What `check` wants of the inputs of a shape."""

    shape: AnyShape
    sets: int
    lengths: list[int]
    """Of each request; the longer, the more keys."""

    def answer(
        self, out: torch.Tensor, lse: torch.Tensor | None, request: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The part of a call's results that `expected` is for."""
        ...

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out `[s_q, h_q, d_v]` and lse `[h_q, s_q]` of one request of one set, float32."""
        ...


class ByRequest:
    """Results of decoding: out `[b, s_q, h_q, d_v]` and lse `[b, h_q, s_q]`."""

    def answer(
        self, out: torch.Tensor, lse: torch.Tensor | None, request: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Those of one request."""
        return out[request], None if lse is None else lse[request]


@dataclass
class Inputs(ByRequest):
    """`sets` independent inputs of one shape, with the same lengths.

    q `[sets, b, s_q, h_q, d_qk]`. Paged: one pool k_cache `[blocks, page, h_kv, d_qk]` whose blocks are dealt out at
    random to block_table `[sets, b, max_blocks]`. Contiguous: k_cache `[sets, b, max_length, h_kv, d_qk]`, no table.
    """

    shape: Shape
    sets: int
    q: torch.Tensor
    k_cache: torch.Tensor
    block_table: torch.Tensor | None
    cache_seqlens: torch.Tensor
    lengths: list[int]

    def keys(self, index: int, request: int) -> torch.Tensor:
        """The keys `[length, h_kv, d_qk]` of one request of one set."""
        length = self.lengths[request]
        if self.block_table is None:
            return self.k_cache[index, request, :length]
        blocks = math.ceil(length / self.shape.page)
        pages = self.k_cache[self.block_table[index, request, :blocks].long()]
        return pages.flatten(0, 1)[:length]

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The answer for one request of one set, by `reference`."""
        shape = self.shape
        return reference(self.q[index, request], self.keys(index, request), shape.d_v, shape.d_qk**-0.5, shape.causal)


def paged_inputs(shape: Shape, device: torch.device, sets: int) -> Inputs:
    """Inputs over a paged cache; every set owns its pages."""
    generator, dtype = make_generator(shape, device), DTYPES[shape.dtype]
    lengths = shape.lengths()
    blocks = torch.tensor([math.ceil(length / shape.page) for length in lengths])
    per_set = int(blocks.sum())
    order = torch.randperm(per_set * sets, generator=torch.Generator().manual_seed(shape.seed)).int()
    used = torch.arange(int(blocks.max()))[None, :] < blocks[:, None]
    table = torch.zeros(sets, *used.shape, dtype=torch.int32)
    for index in range(sets):
        table[index][used] = order[index * per_set : (index + 1) * per_set]
    return Inputs(
        shape,
        sets,
        normal((sets, shape.b, shape.s_q, shape.h_q, shape.d_qk), dtype, device, generator),
        normal((per_set * sets, shape.page, shape.h_kv, shape.d_qk), dtype, device, generator),
        table.to(device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        lengths,
    )


def contiguous_inputs(shape: Shape, device: torch.device, sets: int) -> Inputs:
    """Inputs over a cache without pages, `max_length` rows per request."""
    generator, dtype = make_generator(shape, device), DTYPES[shape.dtype]
    lengths = shape.lengths()
    return Inputs(
        shape,
        sets,
        normal((sets, shape.b, shape.s_q, shape.h_q, shape.d_qk), dtype, device, generator),
        normal((sets, shape.b, max(lengths), shape.h_kv, shape.d_qk), dtype, device, generator),
        None,
        torch.tensor(lengths, dtype=torch.int32, device=device),
        lengths,
    )


def reference(
    q: torch.Tensor, k: torch.Tensor, d_v: int, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """One request in float32: q `[s_q, h_q, d]`, k `[length, h_kv, d]` -> out `[s_q, h_q, d_v]`, lse `[h_q, s_q]`."""
    s_q, h_q, _ = q.shape
    length, h_kv, _ = k.shape
    queries = q.float().unflatten(1, (h_kv, h_q // h_kv))
    keys = k.float()
    scores = torch.einsum("qjgd,kjd->jgqk", queries, keys) * scale
    if causal:
        limit = length - (s_q - 1 - torch.arange(s_q, device=q.device))
        scores.masked_fill_(torch.arange(length, device=q.device)[None, :] >= limit[:, None], -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    out = torch.einsum("jgqk,kjd->qjgd", torch.softmax(scores, dim=-1), keys[..., :d_v])
    return out.flatten(1, 2), lse.flatten(0, 1)


def check(inputs: Checked, index: int, out: torch.Tensor, lse: torch.Tensor | None) -> tuple[float, float | None]:
    """Largest relative error of `out` and largest error of `lse`, as calls return them, over three requests of a set.

    The shortest, the longest and the last request are looked at. NaN counts as infinite.
    """
    b = inputs.shape.b
    by_length = sorted(range(b), key=lambda request: inputs.lengths[request])
    worst, worst_lse = 0.0, 0.0
    for request in {by_length[0], by_length[-1], b - 1}:
        wanted, wanted_lse = inputs.expected(index, request)
        given, given_lse = inputs.answer(out, lse, request)
        worst = max(worst, _finite((given.float() - wanted).norm() / wanted.norm()))
        if given_lse is not None:
            worst_lse = max(worst_lse, _finite((given_lse.float() - wanted_lse).abs().max()))
    return worst, None if lse is None else worst_lse


def _finite(value: torch.Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf


def make_generator(shape: AnyShape, device: torch.device) -> torch.Generator:
    """Random numbers on `device` that are the same for every contender."""
    return torch.Generator(device=device).manual_seed(shape.seed)


def normal(size: tuple[int, ...], dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """Standard normal values."""
    return torch.empty(size, dtype=dtype, device=device).normal_(generator=generator)
