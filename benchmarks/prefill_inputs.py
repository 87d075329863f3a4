"""Inputs of a dense prefill shape on a device: sequences laid end to end. Needs torch alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.inputs import DTYPES, make_generator, normal
from benchmarks.shapes import PrefillBackwardShape, PrefillShape

_CHECKED_ROWS = 32


@dataclass
class PrefillInputs:
    """`sets` independent inputs of one shape, with the same lengths: q `[sets, tokens, h_q, d_qk]`, k and v alike."""

    shape: PrefillShape
    sets: int
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: list[int]

    def _sequence(self, request: int) -> slice:
        begin = sum(self.lengths[:request])
        return slice(begin, begin + self.lengths[request])

    def _rows(self, request: int) -> torch.Tensor:
        """The queries of a sequence that are checked: its first and its last ones."""
        length = self.lengths[request]
        return torch.tensor(
            sorted({*range(min(length, _CHECKED_ROWS)), *range(max(0, length - _CHECKED_ROWS), length)})
        )

    def answer(
        self, out: torch.Tensor, lse: torch.Tensor | None, request: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What is checked of out `[tokens, h_q, d_v]` and lse `[tokens, h_q]`, laid out as `expected`."""
        rows = self._rows(request).to(out.device) + self._sequence(request).start
        return out[rows], None if lse is None else lse[rows].t()

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out `[rows, h_q, d_v]` and lse `[h_q, rows]` of the checked queries, in float32."""
        where, rows = self._sequence(request), self._rows(request).to(self.q.device)
        shape, length = self.shape, self.lengths[request]
        queries = self.q[index, where][rows].float().unflatten(1, (shape.h_kv, -1))
        keys, values = self.k[index, where].float(), self.v[index, where].float()
        scores = torch.einsum("qjgd,kjd->jgqk", queries, keys) * shape.d_qk**-0.5
        if shape.causal:
            scores.masked_fill_(torch.arange(length, device=rows.device)[None, :] > rows[:, None], -math.inf)
        out = torch.einsum("jgqk,kjd->qjgd", torch.softmax(scores, dim=-1), values)
        return out.flatten(1, 2), torch.logsumexp(scores, dim=-1).flatten(0, 1)


def prefill_inputs(shape: PrefillShape, device: torch.device, sets: int) -> PrefillInputs:
    """Normal values; queries and keys of the same sequences."""
    generator, dtype = make_generator(shape, device), DTYPES[shape.dtype]
    lengths = shape.lengths()
    tokens = sum(lengths)

    def rows(heads: int, width: int) -> torch.Tensor:
        return normal((sets, tokens, heads, width), dtype, device, generator)

    running = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
    q, k, v = rows(shape.h_q, shape.d_qk), rows(shape.h_kv, shape.d_qk), rows(shape.h_kv, shape.d_v)
    return PrefillInputs(shape, sets, q, k, v, running, lengths)


@dataclass
class PrefillBackwardInputs(PrefillInputs):
    """The same with gradients of the output `[sets, tokens, h_q, d_v]`.

    A call gives the gradients of q, k and v. Those of the first and of the last head are checked.
    """

    d_out: torch.Tensor

    def _heads(self) -> list[int]:
        return sorted({0, self.shape.h_q - 1})

    def answer(self, out: Any, lse: torch.Tensor | None, request: int) -> tuple[torch.Tensor, None]:
        """Gradients of q, k and v side by side `[length, heads, 2 * d_qk + d_v]`."""
        where = self._sequence(request)
        return torch.cat([gradient[where][:, self._heads()] for gradient in out], -1), None

    def expected(self, index: int, request: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in float32, head by head; nothing for the lse."""
        where, shape = self._sequence(request), self.shape
        by_head = [self._expected_head(index, where, head) for head in self._heads()]
        return torch.stack(by_head, 1), torch.empty((shape.h_q, 0), device=self.q.device)

    def _expected_head(self, index: int, where: slice, head: int) -> torch.Tensor:
        q, k, v, d_out = (tensor[index, where, head].float() for tensor in (self.q, self.k, self.v, self.d_out))
        scale = self.shape.d_qk**-0.5
        scores = q @ k.t() * scale
        if self.shape.causal:
            scores.masked_fill_(torch.ones_like(scores, dtype=torch.bool).triu_(1), -math.inf)
        p = scores.softmax(-1)
        d_p = d_out @ v.t()
        d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
        return torch.cat((d_s @ k, d_s.t() @ q, p.t() @ d_out), -1)


def prefill_backward_inputs(shape: PrefillBackwardShape, device: torch.device, sets: int) -> PrefillBackwardInputs:
    """Inputs as of the forward, and normal gradients."""
    forward = prefill_inputs(shape, device, sets)
    size = (*forward.q.shape[:3], shape.d_v)
    generator = make_generator(replace(shape, seed=shape.seed + 1), device)
    d_out = normal(size, DTYPES[shape.dtype], device, generator)
    return PrefillBackwardInputs(**vars(forward), d_out=d_out)
