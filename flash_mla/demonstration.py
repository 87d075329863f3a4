"""The jobs of `python -m flash_mla`: calls as engines make them, each with its work and its right answer."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import flash_mla
from flash_mla.kv_format import KVFormat
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillProblem
from flash_mla.testing import (
    Answer,
    expected_dense_decode,
    expected_dense_prefill,
    expected_sparse_decode,
    expected_sparse_prefill,
    make_dense_decode_inputs,
    make_dense_prefill_inputs,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
)
from flash_mla.testing.roofline import (
    Work,
    dense_decode_work,
    dense_prefill_work,
    sparse_decode_work,
    sparse_prefill_work,
)

V32_ROW_BYTES = KVFormat.V32.layout.bytes_per_token
_CHECKED_QUERIES = 128

Results = tuple[Tensor, Tensor]


@dataclass
class Prepared:
    """A job whose tensors are there."""

    problem: Problem
    call: Callable[[], Results]
    """out and lse."""
    part: str
    """What is checked one at a time: a word, in the plural."""
    parts: Sequence[int]
    """Those that are checked, by number."""
    given: Callable[[Tensor, Tensor, int], Results]
    """A part of out and lse."""
    expected: Callable[[int], Answer]
    """The right answer for a part."""


def _request(out: Tensor, lse: Tensor, part: int) -> Results:
    return out[part : part + 1], lse[part : part + 1]


@dataclass(frozen=True)
class DenseDecode:
    """Paged decode: one new token per request, causal, bf16."""

    lengths: tuple[int, ...]
    h_q: int
    page: int = 64

    def describe(self) -> str:
        """One line."""
        spread = f"{min(self.lengths):,} to {max(self.lengths):,} keys, {sum(self.lengths):,} in all"
        return f"{len(self.lengths)} requests of {spread}; {self.h_q} heads, pages of {self.page}, bf16"

    def work(self) -> Work:
        """The least that the call must do."""
        return dense_decode_work(self.lengths, s_q=1, h_q=self.h_q)

    def prepare(self, device: torch.device) -> Prepared:
        """Make the tensors."""
        inputs = make_dense_decode_inputs(self.lengths, h_q=self.h_q, page=self.page, device=device, causal=True)
        schedule, _ = flash_mla.get_mla_metadata()
        arguments = {**inputs.call(), "tile_scheduler_metadata": schedule}
        return Prepared(
            DenseDecodeProblem.of(inputs.q, inputs.k_cache),
            lambda: flash_mla.flash_mla_with_kvcache(**arguments),
            "requests",
            range(len(self.lengths)),
            _request,
            lambda part: expected_dense_decode(inputs.rows(slice(part, part + 1))),
        )


@dataclass(frozen=True)
class SparseDecode:
    """One new token per request, which selects `topk` rows of one cache of V32 pages."""

    requests: int
    topk: int
    h_q: int
    pages: int
    page: int = 64

    def describe(self) -> str:
        """One line."""
        selected = f"{self.requests} requests, each of {self.topk:,} out of {self.pages * self.page:,} cached tokens"
        return f"{selected}; {self.h_q} heads, pages of {self.page}, FP8 (V32)"

    def work(self) -> Work:
        """The least that the call must do."""
        return sparse_decode_work(self.requests * self.topk, h_q=self.h_q, bytes_per_token=V32_ROW_BYTES)

    def prepare(self, device: torch.device) -> Prepared:
        """Make the tensors."""
        inputs = make_sparse_decode_inputs(
            self.requests,
            h_q=self.h_q,
            topk=self.topk,
            kv_format=KVFormat.V32,
            page=self.page,
            num_blocks=self.pages,
            invalid=0.0,
            device=device,
        )
        schedule, _ = flash_mla.get_mla_metadata()
        arguments = {**inputs.call(), "tile_scheduler_metadata": schedule}
        return Prepared(
            SparseDecodeProblem.of(inputs.q, inputs.primary.cache, inputs.primary.indices),
            lambda: flash_mla.flash_mla_with_kvcache(**arguments),
            "requests",
            range(self.requests),
            _request,
            lambda part: expected_sparse_decode(inputs.rows(slice(part, part + 1))),
        )


@dataclass(frozen=True)
class SparsePrefill:
    """`s_q` queries, each over `topk` of `s_kv` bf16 rows."""

    s_q: int
    s_kv: int
    topk: int
    h_q: int

    def describe(self) -> str:
        """One line."""
        return f"{self.s_q:,} queries, each over {self.topk:,} of {self.s_kv:,} rows; {self.h_q} heads, bf16"

    def work(self) -> Work:
        """The least that the call must do."""
        return sparse_prefill_work(self.s_q, self.s_kv, self.topk, h_q=self.h_q)

    def prepare(self, device: torch.device) -> Prepared:
        """Make the tensors."""
        inputs = make_sparse_prefill_inputs(
            self.s_q, h_q=self.h_q, topk=self.topk, page=64, num_blocks=self.s_kv // 64, invalid=0.0, device=device
        )
        arguments = inputs.call()

        def call() -> Results:
            out, _, lse = flash_mla.flash_mla_sparse_fwd(**arguments)
            return out, lse

        return Prepared(
            SparsePrefillProblem.of(inputs.q, inputs.primary.cache, inputs.primary.indices),
            call,
            "queries",
            range(0, self.s_q, max(1, self.s_q // _CHECKED_QUERIES)),
            _request,
            lambda part: expected_sparse_prefill(inputs.rows(slice(part, part + 1))),
        )


@dataclass(frozen=True)
class DensePrefill:
    """Sequences of as many queries as keys, causal, head dims 192 and 128, bf16."""

    lengths: tuple[int, ...]
    h_q: int

    def describe(self) -> str:
        """One line."""
        spread = f"{min(self.lengths):,} to {max(self.lengths):,} tokens, {sum(self.lengths):,} in all"
        return f"{len(self.lengths)} sequences of {spread}; {self.h_q} heads, causal, bf16"

    def work(self) -> Work:
        """The least that the call must do."""
        return dense_prefill_work(self.lengths, h_q=self.h_q, h_kv=self.h_q)

    def prepare(self, device: torch.device) -> Prepared:
        """Make the tensors."""
        inputs = make_dense_prefill_inputs(
            [(n, n) for n in self.lengths], h_q=self.h_q, h_kv=self.h_q, causal=True, device=device
        )
        arguments = inputs.call()

        def tokens(part: int) -> slice:
            begin = sum(self.lengths[:part])
            return slice(begin, begin + self.lengths[part])

        return Prepared(
            DensePrefillProblem.of(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_qo, causal=True),
            lambda: flash_mla.flash_attn_varlen_func(**arguments),
            "sequences",
            range(len(self.lengths)),
            lambda out, lse, part: (out[tokens(part)], lse[tokens(part)]),
            lambda part: expected_dense_prefill(inputs.sequence(part)),
        )


Job = DenseDecode | SparseDecode | SparsePrefill | DensePrefill


def jobs(served: Mapping[str, bool], quick: bool) -> dict[str, Job]:
    """By operation. `served`: whether kernels serve it; the reference gets what it can do in seconds."""
    return {
        "dense_decode": _dense_decode(served["dense_decode"], quick),
        "sparse_decode": _sparse_decode(served["sparse_decode"], quick),
        "sparse_prefill": _sparse_prefill(served["sparse_prefill"], quick),
        "dense_prefill": _dense_prefill(served["dense_prefill"], quick),
    }


def _dense_decode(large: bool, quick: bool) -> DenseDecode:
    """Lengths as in service: many short, few long."""
    if not large:
        return DenseDecode((2048, 700, 1, 65)[:2] if quick else (2048, 700, 1300, 65), h_q=16)
    count, longest = (64, 16384) if quick else (128, 40960)
    return DenseDecode(_drawn(count, 256, longest), h_q=128)


def _sparse_decode(large: bool, quick: bool) -> SparseDecode:
    """What is selected is far larger than an L2 cache, where a kernel serves the call."""
    if not large:
        return SparseDecode(requests=2 if quick else 4, topk=512, h_q=16, pages=32)
    return SparseDecode(requests=64 if quick else 128, topk=2048, h_q=128, pages=8192 if quick else 16384)


def _sparse_prefill(large: bool, quick: bool) -> SparsePrefill:
    if not large:
        return SparsePrefill(s_q=16 if quick else 64, s_kv=1024, topk=256, h_q=16)
    return SparsePrefill(s_q=1024 if quick else 4096, s_kv=8192, topk=2048, h_q=128)


def _dense_prefill(large: bool, quick: bool) -> DensePrefill:
    if not large:
        return DensePrefill((200, 37) if quick else (300, 200, 37), h_q=4)
    return DensePrefill(_drawn(8 if quick else 32, 128, 4096), h_q=16)


def _drawn(count: int, shortest: int, longest: int) -> tuple[int, ...]:
    draw = random.Random(0)
    return tuple(int(shortest * (longest / shortest) ** draw.random()) for _ in range(count))
