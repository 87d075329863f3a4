"""Capability queries: what serves a call, and what the kernels of this build can do."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from flash_mla import _ops, backends
from flash_mla.backends import cuda, triton
from flash_mla.errors import wanted
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillProblem

# By operation: its problem, the tensors of a call that it is made from, and the other arguments that matter.
_EXTRA = ("extra_k_cache", "extra_indices_in_kvcache", "kv_format")
_OPERATIONS: dict[str, tuple[Any, tuple[str, ...], tuple[str, ...]]] = {
    "dense_decode": (DenseDecodeProblem, ("q", "k_cache"), ("head_dim_v", "softmax_scale", "kv_format")),
    "sparse_decode": (SparseDecodeProblem, ("q", "k_cache", "indices"), _EXTRA),
    "sparse_prefill": (SparsePrefillProblem, ("q", "kv", "indices"), ("d_v", *_EXTRA)),
    "dense_prefill": (DensePrefillProblem, ("q", "k", "v", "cu_seqlens_qo"), ("causal", "deterministic")),
    "kv_cache": (KVCacheProblem, ("cache",), ("format",)),
}
OPERATIONS = tuple(_OPERATIONS)


def why_not(op: str, problem: Problem | None = None, **call: Any) -> str | None:
    """Why no kernel, of CUDA or Triton, serves a call; None when one does.

    Under `backends.use(...)` or `FLASH_MLA_BACKEND` only the backend named there is asked.

    Args:
        op: "dense_decode" (`flash_mla_with_kvcache` without indices), "sparse_decode" (with them), "sparse_prefill"
            (`flash_mla_sparse_fwd`), "dense_prefill" (`flash_attn_varlen_func`) or "kv_cache" (`append_kv_cache` and
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
    declined = triton.NOT_SERVED if backends.override is backends.TRITON else triton.NOT_SERVED | triton.BY_NAME_ONLY
    if not call and op in cuda.WITHOUT_KERNELS and op in declined:
        reasons = {"cuda": _ops.no_kernels(op), "triton": declined[op]}
        return backends.listed({backend.name: reasons[backend.name] for backend in backends.with_kernels()})
    if not all(isinstance(call.get(name), torch.Tensor) for name in tensors):
        names = " and ".join(f"{name}=" for name in tensors)
        raise TypeError(wanted("why_not", f"a {kind.__name__}, or the tensors {names}", sorted(call)))
    known = {name: call[name] for name in options if name in call}
    return backends.why_no_kernel(kind.of(**{name: call[name] for name in tensors}, **known))


@dataclass(frozen=True)
class KernelSupport:
    """What one kernel takes on one architecture: one line of the support matrix."""

    kernel: str
    compute_capability: int
    dtypes: tuple[str, ...]
    d_qk: tuple[int, ...]
    page_block_sizes: tuple[int, ...]
    h_kv: tuple[int, ...]
    reason: str
    """Why it takes nothing at all, else ""."""


ARCHITECTURES = (80, 90, 100)
_BASE = DenseDecodeProblem("cuda", 90, torch.bfloat16, 8, 1, 48, 1, 576, 512, 64, 576**-0.5)
_GRID: dict[str, tuple[Any, ...]] = {
    "dtype": (torch.bfloat16, torch.float16),
    "d_qk": (576, 512),
    "page_block_size": (1, 3, 16, 32, 64, 128, 256, 1000),
    "h_kv": (1, 2, 3, 8),
}


def kernels() -> list[KernelSupport]:
    """What each dense decode kernel of the native library takes, by asking its table over a grid of features.

    A value is listed when the kernel takes it together with some values of the other features. Needs no GPU; empty
    without the library.
    """
    supported = []
    for capability in ARCHITECTURES:
        base = replace(_BASE, compute_capability=capability)
        combinations = [dict(zip(_GRID, values, strict=True)) for values in product(*_GRID.values())]
        tables = [(features, cuda.dense_decode_table(replace(base, **features))) for features in combinations]
        for kernel, reason in cuda.dense_decode_table(base).items():
            taken = [features for features, table in tables if table[kernel] == ""]
            supported.append(_support(kernel, capability, taken, "" if taken else reason))
    return supported


def _support(kernel: str, capability: int, taken: list[dict[str, Any]], reason: str) -> KernelSupport:
    def values(feature: str) -> tuple[Any, ...]:
        return tuple(value for value in _GRID[feature] if any(features[feature] == value for features in taken))

    return KernelSupport(
        kernel,
        capability,
        tuple(str(dtype).removeprefix("torch.") for dtype in values("dtype")),
        values("d_qk"),
        values("page_block_size"),
        values("h_kv"),
        reason,
    )
