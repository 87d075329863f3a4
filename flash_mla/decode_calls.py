"""Decode calls: planned, sent to an operator, explained when refused."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_mla import arguments, backends, errors, problem, problem_sparse
from flash_mla.kv_format import BYTE_DTYPES, KVFormat
from flash_mla.schedule import FlashMLASchedMeta

Arguments = tuple[Any, ...]


class Operation(ABC):
    """An operator that decodes, called as `op(*keys, rows, splits, *options)`: two tensors of a schedule in the middle.

    `keys` begins with q and k_cache, `options` with attn_sink.
    """

    def __init__(self, op: str) -> None:
        self.op = op
        self.op_out = f"{op}_out"

    @abstractmethod
    def config(self, q_shape: Sequence[int], keys: Arguments, options: Arguments) -> Arguments:
        """The shapes that a schedule is made for: the fields of `FlashMLASchedMeta.Config`. Runs on every call."""

    @abstractmethod
    def plan(self, operators: backends.Operators, keys: Arguments, config: Arguments) -> tuple[Tensor, Tensor]:
        """A new schedule."""

    @abstractmethod
    def check(self, keys: Arguments, options: Arguments, out: Any, lse: Any) -> None:
        """Raise the error that names a wrong argument other than the schedule."""

    @abstractmethod
    def problem(self, keys: Arguments, options: Arguments) -> problem.Problem:
        """What the choice of a backend depends on."""


class _Dense(Operation):
    """keys: q, k_cache, block_table, cache_seqlens. options: attn_sink, head_dim_v, softmax_scale, causal,
    batch_invariant."""

    is_fp8 = False

    def config(self, q_shape: Sequence[int], keys: Arguments, options: Arguments) -> Arguments:
        b, s_q, h_q, _ = q_shape
        _, page, h_kv, _ = keys[1].shape
        return (b, s_q, h_q, page, h_kv, options[3], self.is_fp8, None, None, None)

    def plan(self, operators: backends.Operators, keys: Arguments, config: Arguments) -> tuple[Tensor, Tensor]:
        _, s_q, h_q, _, h_kv, *_ = config
        rows, splits = operators.plan_dense_decode(keys[3], s_q, h_q, h_kv)
        return rows, splits

    def check(self, keys: Arguments, options: Arguments, out: Any, lse: Any) -> None:
        arguments.check_flag("enable_batch_invariant", options[4])
        inputs: Arguments = (*keys, None, None, *options[:4], True, out, lse)
        problem.check_dense_decode(*inputs)

    def problem(self, keys: Arguments, options: Arguments) -> problem.Problem:
        q, k_cache, *_ = keys
        _, head_dim_v, softmax_scale, *_ = options
        return problem.DenseDecodeProblem.of(q, k_cache, head_dim_v, softmax_scale)


class _DenseFP8(_Dense):
    """The same over a cache of bytes. More options: descale_q, descale_k, kv_format (None: e4m3 values times
    descale_k)."""

    is_fp8 = True

    def check(self, keys: Arguments, options: Arguments, out: Any, lse: Any) -> None:
        arguments.check_flag("enable_batch_invariant", options[4])
        inputs: Arguments = (*keys, None, None, *options[:4], True, *options[5:], out, lse)
        problem.check_dense_decode_fp8(*inputs)

    def problem(self, keys: Arguments, options: Arguments) -> problem.Problem:
        q, k_cache, *_ = keys
        _, head_dim_v, softmax_scale, *_, kv_format = options
        return problem.DenseDecodeProblem.of(q, k_cache, head_dim_v, softmax_scale, kv_format)


class _Sparse(Operation):
    """keys: q, k_cache, indices, topk_length, extra_k_cache, extra_indices, extra_topk_length. options: attn_sink,
    kv_format, extra_kv_format, head_dim_v, softmax_scale, batch_invariant."""

    def config(self, q_shape: Sequence[int], keys: Arguments, options: Arguments) -> Arguments:
        b, s_q, h_q, _ = q_shape
        _, k_cache, indices, _, extra_k_cache, extra_indices, _ = keys
        extra_page = extra_topk = None
        if extra_k_cache is not None:
            extra_page, extra_topk = extra_k_cache.shape[1], extra_indices.shape[2]
        is_fp8 = options[1] != "BF16"
        return (b, s_q, h_q, k_cache.shape[1], 1, False, is_fp8, indices.shape[2], extra_page, extra_topk)

    def plan(self, operators: backends.Operators, keys: Arguments, config: Arguments) -> tuple[Tensor, Tensor]:
        q, _, _, topk_length, _, _, extra_topk_length = keys
        _, s_q, h_q, _, _, _, _, topk, _, extra_topk = config
        lengths = (topk_length, extra_topk_length)
        rows, splits = operators.plan_sparse_decode(q, *lengths, s_q, h_q, topk, extra_topk or 0)
        return rows, splits

    def check(self, keys: Arguments, options: Arguments, out: Any, lse: Any) -> None:
        arguments.check_flag("enable_batch_invariant", options[5])
        inputs: Arguments = (*keys, None, None, *options[:5], True, out, lse)
        problem_sparse.check_sparse_decode(*inputs)

    def problem(self, keys: Arguments, options: Arguments) -> problem.Problem:
        q, k_cache, indices, _, extra_k_cache, extra_indices, _ = keys
        _, kv_format, _, head_dim_v, softmax_scale, _ = options
        caches = (k_cache, indices, extra_k_cache, extra_indices)
        return problem_sparse.SparseDecodeProblem.of(q, *caches, KVFormat(kv_format), head_dim_v, softmax_scale)


DENSE, DENSE_FP8, SPARSE = _Dense("dense_decode"), _DenseFP8("dense_decode_fp8"), _Sparse("sparse_decode")


def dense_fp8_name(q: Any, k_cache: Tensor, kv_format: Any) -> str | None:
    """The option kv_format of a dense call over this cache of bytes."""
    arguments.check_tensor("q", q, 4, "[b, s_q, h_q, d_qk]")
    known = problem.dense_fp8_format(k_cache, q.shape[-1], kv_format)
    return None if known is None else known.value


def run(
    operators: backends.Operators,
    operation: Operation,
    q_shape: Sequence[int],
    keys: Arguments,
    options: Arguments,
    schedule: Any,
    num_splits: Any,
    batch_invariant: Any,
    out: Any,
    lse: Any,
) -> tuple[Tensor, Tensor]:
    """Plan if there is no plan, then decode. Host time counts here: it runs on every call."""
    rows, splits = schedule, num_splits
    adopted = None
    if batch_invariant:
        rows = splits = None
    elif isinstance(schedule, FlashMLASchedMeta):
        rows, splits = schedule.tile_scheduler_metadata, schedule.num_splits
        config = operation.config(q_shape, keys, options)
        if rows is None or splits is None:
            adopted = config
            rows, splits = operation.plan(operators, keys, config)
        elif schedule.have_initialized:
            schedule.check(config)
        else:  # the caller wrote the rows
            adopted = config
    if out is None and lse is None:
        out, lse = getattr(operators, operation.op)(*keys, rows, splits, *options)
    else:
        q = keys[0]
        b, s_q, h_q, _ = q_shape
        if out is None:
            out = q.new_empty((b, s_q, h_q, problem.HEAD_DIM_V), dtype=problem.out_dtype(q))
        if lse is None:
            lse = q.new_empty((b, h_q, s_q), dtype=torch.float32)
        getattr(operators, operation.op_out)(*keys, rows, splits, *options, out, lse)
    if adopted is not None:
        # Kept only now, when the operator has accepted the arguments that the plan was made from.
        schedule.adopt(rows, splits, adopted)
    return out, lse


def explain_or_reroute(
    error: Exception,
    operation: Operation,
    q_shape: Sequence[int],
    keys: Arguments,
    options: Arguments,
    schedule: Any,
    num_splits: Any,
    batch_invariant: Any,
    out: Any,
    lse: Any,
) -> tuple[Tensor, Tensor]:
    """After a refused call: raise the error that names the argument; or let the next backend serve what was declined.

    Only an operator that declined before any launch gets here with `UnsupportedError`. Every other failure is raised.
    """
    call = (schedule, num_splits, batch_invariant, out, lse)
    q, k_cache, *_ = keys
    if operation is DENSE and isinstance(k_cache, Tensor) and k_cache.dtype in BYTE_DTYPES:
        # Nothing else told that the cache is FP8.
        options = (*options, None, None, dense_fp8_name(q, k_cache, None))
        try:
            return run(backends.active, DENSE_FP8, q_shape, keys, options, *call)
        except Exception as second:
            return explain_or_reroute(second, DENSE_FP8, q_shape, keys, options, *call)
    operation.check(keys, options, out, lse)
    if not batch_invariant:
        _check_schedule(q, schedule, num_splits, operation.config(q_shape, keys, options))
    failure = errors.from_native(error)
    if not isinstance(failure, errors.UnsupportedError):
        raise failure from None
    other = backends.after(failure, operation.problem(keys, options))
    return run(other.operators, operation, q_shape, keys, options, *call)


def _check_schedule(q: Tensor, schedule: Any, num_splits: Any, config: Arguments) -> None:
    """Check a schedule, in either form, beside arguments that are right. An object without a plan is right."""
    rows, splits = schedule, num_splits
    if isinstance(schedule, FlashMLASchedMeta):
        rows, splits = schedule.tile_scheduler_metadata, schedule.num_splits
        if rows is None or splits is None:
            return
        if schedule.have_initialized:
            schedule.check(config)
    problem.check_schedule(q, rows, splits)
