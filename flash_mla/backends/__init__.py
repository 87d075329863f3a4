"""Which implementation serves a call: an ordered registry, and the choice from it.

Order: the CUDA kernels, then the reference. (Triton kernels will stand between them.) The first whose `why_not` has
nothing against the problem serves it. `FLASH_MLA_BACKEND=cuda|reference`, or `use(...)`, allows one backend only.

The public functions do not walk this list on each call: they call `active`, whose operators torch dispatches by device
and whose native implementation asks the kernel table. Only when that declines, before any launch, is the list
consulted. A launch that failed is never repeated elsewhere.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flash_mla.backends import cuda, reference
from flash_mla.errors import UnsupportedError, wanted
from flash_mla.problem import DenseDecodeProblem


@dataclass(frozen=True)
class Operators:
    """The operators that calls go to."""

    dense_decode: Callable[..., Any]
    dense_decode_out: Callable[..., Any]
    plan_dense_decode: Callable[..., Any]
    merge_attention_states: Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """One way to serve calls."""

    name: str
    why_not: Callable[[DenseDecodeProblem], str | None]
    """None, or why the backend does not take the problem."""
    operators: Operators


def _cuda_only(op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` for CUDA tensors, `UnsupportedError` for others. For calls that must not be served by anything else."""

    def call(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, (list, tuple)) else first
        if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
            raise UnsupportedError(f"backend cuda: the tensors are on {tensor.device.type}")
        if cuda_missing is not None:
            raise UnsupportedError(f"backend cuda: {cuda_missing}")
        return op(first, *rest)

    return call


cuda_missing = cuda.missing()
"""None when the native library is loaded, else the reason."""

_ops = torch.ops.flash_mla
AUTOMATIC = Operators(
    _ops.dense_decode.default,
    _ops.dense_decode_out.default,
    _ops.plan_dense_decode.default,
    _ops.merge_attention_states.default,
)
CUDA = Backend(
    "cuda",
    cuda.why_not,
    Operators(
        _cuda_only(AUTOMATIC.dense_decode),
        _cuda_only(AUTOMATIC.dense_decode_out),
        _cuda_only(AUTOMATIC.plan_dense_decode),
        _cuda_only(AUTOMATIC.merge_attention_states),
    ),
)
REFERENCE = Backend(
    "reference",
    lambda problem: None,
    Operators(
        _ops.reference_dense_decode.default,
        _ops.reference_dense_decode_out.default,
        _ops.reference_plan_dense_decode.default,
        _ops.reference_merge_attention_states.default,
    ),
)

REGISTRY = (CUDA, REFERENCE)
"""In order of preference."""

override: Backend | None = None
"""The only backend allowed, if one is set."""

active: Operators = AUTOMATIC
"""What the public functions call."""


def set_backend(name: str | None) -> None:
    """Allow one backend only, for the whole process; None allows all again.

    Raises:
        ValueError: no backend has this name.
    """
    global override, active
    by_name = {backend.name: backend for backend in REGISTRY}
    if name is not None and name not in by_name:
        raise ValueError(wanted("backend", " or ".join(by_name), name))
    override = None if name is None else by_name[name]
    active = AUTOMATIC if override is None else override.operators


@contextmanager
def use(name: str | None) -> Iterator[None]:
    """Allow one backend only, inside a `with` block: `with flash_mla.backends.use("reference"): ...`. Process-wide."""
    before = None if override is None else override.name
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def select(problem: DenseDecodeProblem) -> Backend:
    """The backend that serves `problem`: the first allowed one that has nothing against it.

    Raises:
        UnsupportedError: none takes it; the text lists every candidate and its reason.
    """
    reasons = []
    for backend in REGISTRY if override is None else (override,):
        reason = backend.why_not(problem)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise UnsupportedError(f"dense decode: no backend takes the problem; {'; '.join(reasons)}")


def _from_environment() -> None:
    name = os.environ.get("FLASH_MLA_BACKEND") or None
    names = [backend.name for backend in REGISTRY]
    if name is not None and name not in names:
        raise ValueError(wanted("FLASH_MLA_BACKEND", " or ".join(names), name))
    set_backend(name)


_from_environment()

__all__ = [
    "AUTOMATIC",
    "CUDA",
    "REFERENCE",
    "REGISTRY",
    "Backend",
    "Operators",
    "active",
    "cuda",
    "cuda_missing",
    "override",
    "reference",
    "select",
    "set_backend",
    "use",
]
