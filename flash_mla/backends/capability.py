"""Capability queries: what serves a call, and what the kernels of this build can do."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch

from flash_mla import backends
from flash_mla.backends import cuda
from flash_mla.errors import wanted
from flash_mla.kv_format import KVFormat
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import HEAD_DIM_V, HEAD_DIMS_QK, DensePrefillBackwardProblem, DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillBackwardProblem, SparsePrefillProblem

# By operation: its problem, the tensors of a call that it is made from, and the other arguments that matter.
_EXTRA = ("extra_k_cache", "extra_indices_in_kvcache", "kv_format")
_OPTIONS = ("head_dim_v", "softmax_scale")
_PREFILL_OPTIONS = ("causal", "deterministic", "softmax_scale")
_OPERATIONS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "dense_decode": (DenseDecodeProblem, ("q", "k_cache"), (*_OPTIONS, "kv_format")),
    "sparse_decode": (SparseDecodeProblem, ("q", "k_cache", "indices"), (*_OPTIONS, *_EXTRA)),
    "sparse_prefill": (SparsePrefillProblem, ("q", "kv", "indices"), ("d_v", "sm_scale", *_EXTRA)),
    "sparse_prefill_backward": (SparsePrefillBackwardProblem, ("q", "kv", "indices"), ("d_v", "sm_scale", *_EXTRA)),
    "dense_prefill": (DensePrefillProblem, ("q", "k", "v", "cu_seqlens_qo"), _PREFILL_OPTIONS),
    "dense_prefill_backward": (DensePrefillBackwardProblem, ("q", "k", "v", "cu_seqlens_qo"), _PREFILL_OPTIONS),
    "kv_cache": (KVCacheProblem, ("cache",), ("format",)),
}
OPERATIONS = tuple(_OPERATIONS)


def why_not(op: str, problem: Problem | None = None, **call: Any) -> str | None:
    """Why no kernel, of CUDA or Triton, serves a call; None when one does.

    Under `backends.use(...)` or `FLASH_MLA_BACKEND` only the backend named there is asked.

    Args:
        op: "dense_decode" (`flash_mla_with_kvcache` without indices), "sparse_decode" (with them), "sparse_prefill"
            (`flash_mla_sparse_fwd`), "sparse_prefill_backward" (its gradients), "dense_prefill"
            (`flash_attn_varlen_func`), "dense_prefill_backward" (its gradients) or "kv_cache" (`append_kv_cache` and
            `dequantize_kv_cache`).
        problem: what is asked for, as a value of the operation's class; or else
        **call: the arguments of the call by name, the tensors at least. Those that make no difference are not looked
            at.

    Returns:
        None, or a text that lists each backend with its reason, or those of its kernels: "cuda: ...; triton: ...". The
        reference backend is not asked: it serves every call.

    Raises:
        ValueError: no such `op`, or the problem is of another one.
        TypeError: neither a problem nor the tensors.
    """
    if op not in OPERATIONS:
        raise ValueError(wanted("op", " or ".join(OPERATIONS), repr(op)))
    kind, tensors, options = _OPERATIONS[op]
    if problem is not None:
        if not isinstance(problem, kind):
            raise ValueError(wanted("problem", f"a {kind.__name__} for {op}", type(problem).__name__))
        return backends.why_no_kernel(problem)
    if not all(isinstance(call.get(name), torch.Tensor) for name in tensors):
        names = " and ".join(f"{name}=" for name in tensors)
        raise TypeError(wanted("why_not", f"a {kind.__name__}, or the tensors {names}", sorted(call)))
    known = {name: call[name] for name in options if name in call}
    return backends.why_no_kernel(kind.of(**{name: call[name] for name in tensors}, **known))


@dataclass(frozen=True)
class KernelSupport:
    """What one kernel takes of one operation on one architecture: one line of the support matrix."""

    op: str
    kernel: str
    compute_capability: int
    dtypes: tuple[str, ...]
    """Of q and the cache; or formats of the cache, "V41 + V41_FP4" where the second is of another one."""
    d_qk: tuple[int, ...]
    page_block_sizes: tuple[int, ...]
    """Of the cache; (0,) where there is none."""
    h_kv: tuple[int, ...]
    reason: str
    """Why it takes nothing at all, else ""."""


ARCHITECTURES = (80, 90, 100)
_NO_PAGE = 0
_PAGES = (1, 3, 16, 32, 64, 128, 256, 1000)
_GRID: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.bfloat16, torch.float16),
    "d_qk": (576, 512),
    "page_block_size": _PAGES,
    "h_kv": (1, 2, 3, 8),
    "h_q": (24, 48, 528),  # some kernels are for few query heads, some for many
}
_FORMATS = (KVFormat.V32, KVFormat.V32_NO_ROPE, KVFormat.MODEL1, KVFormat.V41)


@dataclass(frozen=True)
class _Question:
    """A problem, and the values of the features that it stands for in the matrix."""

    problem: Problem
    dtype: str
    d_qk: int
    page: int
    h_kv: int


def kernels() -> list[KernelSupport]:
    """What each kernel of the native library takes, by asking its tables over a grid of features.

    A value is listed when the kernel takes it together with some values of the other features. Needs no GPU; empty
    without the library.
    """
    questions = (
        _dense_questions,
        _fp8_questions,
        _sparse_questions,
        partial(_sparse_prefill_questions, SparsePrefillProblem),
        partial(_sparse_prefill_questions, SparsePrefillBackwardProblem),
        partial(_dense_prefill_questions, DensePrefillProblem),
        partial(_dense_prefill_questions, DensePrefillBackwardProblem),
    )
    return [
        support for ask in questions for capability in ARCHITECTURES for support in _supported(list(ask(capability)))
    ]


def _dense_questions(capability: int) -> Iterator[_Question]:
    base = DenseDecodeProblem("cuda", capability, torch.bfloat16, 8, 1, 48, 1, 576, 512, 64, 576**-0.5)
    for values in product(*_GRID.values()):
        problem = replace(base, **dict(zip(_GRID, values, strict=True)))
        dtype = str(problem.dtype).removeprefix("torch.")
        yield _Question(problem, dtype, problem.d_qk, problem.page_block_size, problem.h_kv)


# Query heads: some kernels are for few of them, some for many.
_HEADS = (16, 48, 128)


def _fp8_questions(capability: int) -> Iterator[_Question]:
    for known, page, h_q in product(_FORMATS, _PAGES, _HEADS):
        d_qk = known.layout.d_qk
        where = ("cuda", capability, torch.bfloat16, 8, 1, h_q, 1, d_qk, 512, page, 576**-0.5, known.value)
        yield _Question(DenseDecodeProblem(*where), known.value, d_qk, page, 1)
    for d_qk, page, h_q, h_kv in product((576, 512), _PAGES, _HEADS, _GRID["h_kv"]):
        where = ("cuda", capability, torch.bfloat16, 8, 1, h_q, h_kv, d_qk, 512, page, 576**-0.5, "E4M3")
        yield _Question(DenseDecodeProblem(*where), "e4m3 with descale_k", d_qk, page, h_kv)


def _sparse_questions(capability: int) -> Iterator[_Question]:
    for known, extra, d_qk, page, h_q in _sparse_sources():
        extra_page, extra_topk = (None, 0) if extra is None else (page, 512)
        shape = (8, 1, h_q, d_qk, page, extra_page, 2048, extra_topk, 512, 576**-0.5)
        problem = SparseDecodeProblem("cuda", capability, known, extra, *shape)
        yield _Question(problem, _pair(known, extra), d_qk, page, 1)


def _sparse_prefill_questions(kind: type[SparsePrefillProblem], capability: int) -> Iterator[_Question]:
    for known, extra, d_qk, page, h_q in _sparse_sources():
        shape = (4096, h_q, d_qk, 512, 2048, 0 if extra is None else 512, 576**-0.5)
        problem = kind("cuda", capability, known, extra, *shape)
        yield _Question(problem, _pair(known, extra), d_qk, page, 1)


def _sparse_sources() -> Iterator[tuple[KVFormat, KVFormat | None, int, int, int]]:
    """Formats of both caches, d_qk, page, query heads."""
    pairs: list[tuple[KVFormat, KVFormat | None, tuple[int, ...]]] = [
        *((known, None, (known.layout.d_qk,)) for known in _FORMATS),
        (KVFormat.V41, KVFormat.V41_FP4, (512,)),
        (KVFormat.BF16, None, (576, 512)),
    ]
    for (known, extra, sizes), page, h_q in product(pairs, _PAGES, _HEADS):
        for d_qk in sizes:
            yield known, extra, d_qk, page, h_q


def _pair(known: KVFormat, extra: KVFormat | None) -> str:
    return known.value if extra is None else f"{known.value} + {extra.value}"


def _dense_prefill_questions(kind: type[DensePrefillProblem], capability: int) -> Iterator[_Question]:
    for dtype, d_qk, h_kv in product((torch.bfloat16, torch.float16), HEAD_DIMS_QK, (1, 2, 3, 8)):
        shape = (4, 48, h_kv, d_qk, HEAD_DIM_V, True, False, False, d_qk**-0.5)
        problem = kind("cuda", capability, dtype, *shape)
        yield _Question(problem, str(dtype).removeprefix("torch."), d_qk, _NO_PAGE, h_kv)


def _supported(questions: list[_Question]) -> Iterator[KernelSupport]:
    tables = [cuda.kernel_table(question.problem) for question in questions]
    for kernel, reason in tables[0].items():
        taken = [question for question, table in zip(questions, tables, strict=True) if table[kernel] == ""]
        yield KernelSupport(
            questions[0].problem.op,
            kernel,
            questions[0].problem.compute_capability or 0,
            tuple(dict.fromkeys(question.dtype for question in taken)),
            tuple(dict.fromkeys(question.d_qk for question in taken)),
            tuple(dict.fromkeys(question.page for question in taken)),
            tuple(dict.fromkeys(question.h_kv for question in taken)),
            "" if taken else reason,
        )
