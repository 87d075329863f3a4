"""Inputs of a sparse prefill shape on a device. Needs torch alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.inputs import make_generator, normal, reference
from benchmarks.shapes import SparsePrefillBackwardShape, SparsePrefillShape
from benchmarks.sparse_inputs import random_pages, v32_rows

_PAGE = 64


@dataclass
class SparsePrefillInputs:
    """q `[sets, s_q, h_q, d_qk]`, kv bf16 `[s_kv, 1, d_qk]` or e4m3 `[blocks, 64, 1, 656]`, indices int32
    `[sets, s_q, 1, topk]`, sink `[h_q]`."""

    shape: SparsePrefillShape
    sets: int
    q: torch.Tensor
    kv: torch.Tensor
    indices: torch.Tensor
    sink: torch.Tensor | None

    @property
    def lengths(self) -> list[int]:
        """Keys of each query."""
        return [self.shape.topk] * self.shape.s_q

    def answer(
        self, out: torch.Tensor, lse: torch.Tensor | None, request: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Those of one query, of out `[s_q, h_q, d_v]` and lse `[s_q, h_q]`."""
        return out[request : request + 1], None if lse is None else lse[request][:, None]

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out `[1, h_q, d_v]` and lse `[h_q, 1]` of one query, in float32."""
        shape, rows = self.shape, self.indices[index, request, 0].long()
        if shape.source == "BF16":
            keys = self.kv[rows].float()
        else:
            keys = v32_rows(self.kv.view(torch.uint8)[rows // _PAGE, rows % _PAGE, 0])[:, None]
        q = self.q[index, request : request + 1]
        out, lse = reference(q, keys, shape.d_v, shape.d_qk**-0.5, causal=False)
        if self.sink is not None:
            out *= torch.sigmoid(lse[:, 0] - self.sink)[None, :, None]
        return out, lse


def sparse_prefill_inputs(shape: SparsePrefillShape, device: torch.device, sets: int) -> SparsePrefillInputs:
    """Normal queries and rows; every query selects rows of its own, in random order."""
    generator = make_generator(shape, device)
    q = normal((sets, shape.s_q, shape.h_q, shape.d_qk), torch.bfloat16, device, generator)
    if shape.source == "BF16":
        kv = normal((shape.s_kv, 1, shape.d_qk), torch.bfloat16, device, generator)
    else:
        blocks = math.ceil(shape.s_kv / _PAGE)
        kv = random_pages("V32", blocks, _PAGE, generator).view(blocks, _PAGE, 1, 656).view(torch.float8_e4m3fn)
    indices = torch.empty((sets, shape.s_q, 1, shape.topk), dtype=torch.int32, device=device)
    at_once = max(1, (1 << 26) // shape.s_kv)
    for rows in indices.flatten(0, 1).split(at_once):
        order = torch.rand((len(rows), shape.s_kv), generator=generator, device=device).argsort(dim=-1)
        rows[:, 0] = order[:, : shape.topk]
    sink = normal((shape.h_q,), torch.float32, device, generator) if shape.sink else None
    return SparsePrefillInputs(shape, sets, q, kv, indices, sink)


@dataclass
class SparsePrefillBackwardInputs(SparsePrefillInputs):
    """The same with gradients of the output `[sets, s_q, h_q, d_v]`.

    A call gives the gradients of q, kv and the sink. That of a query is checked, and that of the row of its number, to
    which all queries add that select it.
    """

    d_out: torch.Tensor

    def answer(self, out: Any, lse: torch.Tensor | None, request: int) -> tuple[torch.Tensor, None]:
        """Gradients of q and of the row `[1, h_q + 1, d_qk]`."""
        d_q, d_kv = out[:2]
        row = d_kv.flatten(0, -2)[request % self.shape.s_kv]
        return torch.cat((d_q[request], row[None]))[None], None

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in float32; nothing for the lse."""
        own = torch.tensor([request], device=self.q.device)
        ((d_q, _),) = self._gradients(index, own)
        is_row = self.indices[index, :, 0] == request % self.shape.s_kv
        selecting = is_row.any(-1).nonzero()[:, 0]
        d_row = torch.zeros_like(d_q[0, 0])
        for queries, (_, d_keys) in zip(selecting.split(_QUERIES), self._gradients(index, selecting), strict=True):
            d_row += d_keys[is_row[queries]].sum(0)
        return torch.cat((d_q, d_row[None, None]), 1), torch.empty((self.shape.h_q, 0), device=self.q.device)

    def _gradients(self, index: int, queries: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of some queries at a time: of q `[queries, h_q, d_qk]` and of the selected rows `[queries, topk, d_qk]`."""
        scale = self.shape.d_qk**-0.5
        for some in queries.split(_QUERIES):
            keys, q = self.kv[self.indices[index, some, 0].long(), 0].float(), self.q[index, some].float()
            d_out, values = self.d_out[index, some].float(), keys[..., : self.shape.d_v]
            scores = q @ keys.mT * scale
            lse = scores.logsumexp(-1, keepdim=True)
            p = (scores - (lse if self.sink is None else torch.logaddexp(lse, self.sink[:, None]))).exp()
            d_p = d_out @ values.mT
            d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
            d_keys = d_s.mT @ q
            d_keys[..., : self.shape.d_v] += p.mT @ d_out
            yield d_s @ keys, d_keys


_QUERIES = 32  # at a time


def sparse_prefill_backward_inputs(
    shape: SparsePrefillBackwardShape, device: torch.device, sets: int
) -> SparsePrefillBackwardInputs:
    """Inputs as of the forward, and normal gradients."""
    forward = sparse_prefill_inputs(shape, device, sets)
    generator = make_generator(replace(shape, seed=shape.seed + 1), device)
    d_out = normal((*forward.q.shape[:3], shape.d_v), torch.bfloat16, device, generator)
    return SparsePrefillBackwardInputs(**vars(forward), d_out=d_out)
