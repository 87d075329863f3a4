"""Decode calls beside dense decode over bf16 and fp16 caches: planned, sent to an operator, explained when refused."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_mla import arguments, backends, errors, problem, problem_sparse
from flash_mla.kv_format import KVFormat
from flash_mla.schedule import FlashMLASchedMeta


@dataclass(slots=True)
class DecodeCall(ABC):
    """What the calls have in common. The checks of arguments are the operators' own, as long as nothing is refused."""

    op: ClassVar[str]

    q: Any
    k_cache: Any
    schedule: Any
    num_splits: Any
    attn_sink: Any
    head_dim_v: Any
    softmax_scale: Any
    batch_invariant: Any
    out: Any
    lse: Any

    @abstractmethod
    def inputs(self, rows: Any, splits: Any) -> tuple[Any, ...]:
        """The operator's arguments, with these tensors of a schedule."""

    @abstractmethod
    def check(self) -> None:
        """Raise the error that names a wrong argument other than the schedule."""

    @abstractmethod
    def config(self) -> FlashMLASchedMeta.Config:
        """The shapes that a schedule is made for."""

    @abstractmethod
    def plan(self, operators: backends.Operators) -> tuple[Tensor, Tensor]:
        """A new schedule."""

    @abstractmethod
    def problem(self) -> problem.Problem:
        """What the choice of a backend depends on."""


@dataclass(slots=True)
class SparseCall(DecodeCall):
    """Each query attends to the cache rows that its indices name."""

    op: ClassVar[str] = "sparse_decode"

    indices: Any
    topk_length: Any
    extra_k_cache: Any
    extra_indices: Any
    extra_topk_length: Any
    kv_format: KVFormat
    extra_kv_format: KVFormat | None

    def inputs(self, rows: Any, splits: Any) -> tuple[Any, ...]:
        """The operator's arguments, with these tensors of a schedule."""
        return (
            self.q,
            self.k_cache,
            self.indices,
            self.topk_length,
            self.extra_k_cache,
            self.extra_indices,
            self.extra_topk_length,
            rows,
            splits,
            self.attn_sink,
            self.kv_format.value,
            None if self.extra_kv_format is None else self.extra_kv_format.value,
            self.head_dim_v,
            self.softmax_scale,
            self.batch_invariant,
        )

    def check(self) -> None:
        """Raise the error that names a wrong argument other than the schedule."""
        arguments.check_flag("enable_batch_invariant", self.batch_invariant)
        inputs: list[Any] = list(self.inputs(None, None))
        inputs[-1:] = [True, self.out, self.lse]
        problem_sparse.check_sparse_decode(*inputs)

    def config(self) -> FlashMLASchedMeta.Config:
        """The shapes that a schedule is made for."""
        b, s_q, h_q, _ = self.q.shape
        extra = (None, None)
        if self.extra_k_cache is not None:
            extra = (self.extra_k_cache.size(1), self.extra_indices.size(2))
        is_fp8 = self.kv_format is not KVFormat.BF16
        page, topk = self.k_cache.size(1), self.indices.size(2)
        return FlashMLASchedMeta.Config(b, s_q, h_q, page, 1, False, is_fp8, topk, *extra)

    def plan(self, operators: backends.Operators) -> tuple[Tensor, Tensor]:
        """A new schedule."""
        _, s_q, h_q, _ = self.q.shape
        extra_topk = 0 if self.extra_indices is None else self.extra_indices.shape[2]
        lengths = (self.topk_length, self.extra_topk_length)
        rows, splits = operators.plan_sparse_decode(self.q, *lengths, s_q, h_q, self.indices.shape[2], extra_topk)
        return rows, splits

    def problem(self) -> problem.Problem:
        """What the choice of a backend depends on."""
        caches = (self.k_cache, self.indices, self.extra_k_cache, self.extra_indices)
        options = (self.kv_format, self.head_dim_v, self.softmax_scale)
        return problem_sparse.SparseDecodeProblem.of(self.q, *caches, *options)


@dataclass(slots=True)
class DenseFP8Call(DecodeCall):
    """Every query attends to the first rows of its request's pages, in a cache of bytes."""

    op: ClassVar[str] = "dense_decode_fp8"

    block_table: Any
    cache_seqlens: Any
    causal: Any
    descale_q: Any
    descale_k: Any
    kv_format: KVFormat | None
    """None: e4m3 values, times descale_k."""

    def inputs(self, rows: Any, splits: Any) -> tuple[Any, ...]:
        """The operator's arguments, with these tensors of a schedule."""
        return (
            self.q,
            self.k_cache,
            self.block_table,
            self.cache_seqlens,
            rows,
            splits,
            self.attn_sink,
            self.head_dim_v,
            self.softmax_scale,
            self.causal,
            self.batch_invariant,
            self.descale_q,
            self.descale_k,
            None if self.kv_format is None else self.kv_format.value,
        )

    def check(self) -> None:
        """Raise the error that names a wrong argument other than the schedule."""
        arguments.check_flag("enable_batch_invariant", self.batch_invariant)
        inputs: list[Any] = list(self.inputs(None, None))
        inputs[10] = True
        inputs += [self.out, self.lse]
        problem.check_dense_decode_fp8(*inputs)

    def config(self) -> FlashMLASchedMeta.Config:
        """The shapes that a schedule is made for."""
        b, s_q, h_q, _ = self.q.shape
        _, page, h_kv, _ = self.k_cache.shape
        return FlashMLASchedMeta.Config(b, s_q, h_q, page, h_kv, self.causal, True)

    def plan(self, operators: backends.Operators) -> tuple[Tensor, Tensor]:
        """A new schedule."""
        _, s_q, h_q, _ = self.q.shape
        rows, splits = operators.plan_dense_decode(self.cache_seqlens, s_q, h_q, self.k_cache.shape[2])
        return rows, splits

    def problem(self) -> problem.Problem:
        """What the choice of a backend depends on."""
        options = (self.head_dim_v, self.softmax_scale, self.kv_format)
        return problem.DenseDecodeProblem.of(self.q, self.k_cache, *options)


def run(call: DecodeCall) -> tuple[Tensor, Tensor]:
    """Plan if there is no plan, then decode; where an operator refuses, find the words, or the backend that serves.

    Only after an operator that declined before any launch is another backend asked. Every other failure is raised.
    """
    try:
        return _run(backends.active, call)
    except Exception as error:
        call.check()
        if not call.batch_invariant:
            _check_schedule(call)
        failure = errors.from_native(error)
        if not isinstance(failure, errors.UnsupportedError):
            raise failure from None
        return _run(backends.after(failure, call.problem()).operators, call)


def _run(operators: backends.Operators, call: DecodeCall) -> tuple[Tensor, Tensor]:
    rows, splits = call.schedule, call.num_splits
    schedule = call.schedule if isinstance(call.schedule, FlashMLASchedMeta) else None
    first_call = False
    if call.batch_invariant:
        rows = splits = None
    elif schedule is not None:
        rows, splits = schedule.tile_scheduler_metadata, schedule.num_splits
        if rows is None or splits is None:
            first_call = True
            rows, splits = call.plan(operators)
        elif schedule.have_initialized:
            schedule.check(call.config())
        else:  # the caller wrote the rows
            first_call = True
    out, lse = call.out, call.lse
    if out is None and lse is None:
        out, lse = getattr(operators, call.op)(*call.inputs(rows, splits))
    else:
        b, s_q, h_q, _ = call.q.shape
        if out is None:
            out = call.q.new_empty((b, s_q, h_q, call.head_dim_v), dtype=problem.out_dtype(call.q))
        if lse is None:
            lse = call.q.new_empty((b, h_q, s_q), dtype=torch.float32)
        getattr(operators, f"{call.op}_out")(*call.inputs(rows, splits), out, lse)
    if first_call and schedule is not None:
        # Kept only now, when the operator has accepted the arguments that the plan was made from.
        schedule.tile_scheduler_metadata, schedule.num_splits = rows, splits
        schedule.adopt(call.config())
    return out, lse


def _check_schedule(call: DecodeCall) -> None:
    """Check a schedule, in either form, beside arguments that are right. An object without a plan is right."""
    rows, splits = call.schedule, call.num_splits
    if isinstance(rows, FlashMLASchedMeta):
        meta = rows
        if meta.tile_scheduler_metadata is None or meta.num_splits is None:
            return
        if meta.have_initialized:
            meta.check(call.config())
        rows, splits = meta.tile_scheduler_metadata, meta.num_splits
    problem.check_schedule(call.q, rows, splits)
