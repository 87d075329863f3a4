"""Inputs of a sparse prefill shape on a device. Needs torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from benchmarks.inputs import make_generator, normal, reference
from benchmarks.shapes import SparsePrefillShape
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
