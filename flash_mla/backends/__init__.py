"""Which implementation serves a call: an ordered registry, and the choice from it.

Order: the CUDA kernels, the Triton kernels, the reference. The first whose `why_not` has nothing against the problem
serves it. `FLASH_MLA_BACKEND=cuda|triton|reference`, or `use(...)`, allows one backend only. Tensors on the CPU go to
the reference unless Triton is asked for by name: there is only its interpreter to serve them.

The public functions do not walk this list on each call: they call `active`, whose operators torch dispatches by device
and whose native implementation asks the kernel table. Only when that declines, before any launch, is the list
consulted. A launch that failed is never repeated elsewhere.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from flash_mla.backends import cuda, reference, triton
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


def _operators(prefix: str = "", wrap: Callable[[str, Any], Any] = lambda name, op: op) -> Operators:
    """The operators `torch.ops.flash_mla.<prefix>x`, each passed through `wrap`."""
    names = [field.name for field in fields(Operators)]
    return Operators(*(wrap(name, getattr(torch.ops.flash_mla, prefix + name).default) for name in names))


def _triton_first(name: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """`op`, with CUDA tensors handed to Triton: what is called in place of a missing native library.

    Where Triton does not run either, its operator raises `UnsupportedError`, and the reference is next.
    """
    through_triton = getattr(torch.ops.flash_mla, f"triton_{name}").default

    def call(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, (list, tuple)) and first else first
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            return through_triton(first, *rest)
        return op(first, *rest)

    return call


NATIVE = _operators()
AUTOMATIC = NATIVE if cuda_missing is None else _operators(wrap=_triton_first)
"""What serves while no backend is asked for by name."""

CUDA = Backend("cuda", cuda.why_not, _operators(wrap=lambda _, op: _cuda_only(op)))
TRITON = Backend("triton", triton.why_not, _operators("triton_"))
REFERENCE = Backend("reference", lambda problem: None, _operators("reference_"))

REGISTRY = (CUDA, TRITON, REFERENCE)
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


def select(problem: DenseDecodeProblem, behind: Backend | None = None) -> Backend:
    """The backend that serves `problem`: the first allowed one that has nothing against it.

    `behind`: only those that follow this one in the registry.

    Raises:
        UnsupportedError: none takes it; the text lists every candidate and its reason.
    """
    reasons = []
    allowed = REGISTRY if override is None else (override,)
    for backend in allowed[allowed.index(behind) + 1 :] if behind in allowed else allowed:
        reason = _reason(backend, problem)
        if reason is None:
            return backend
        reasons.append(f"{backend.name}: {reason}")
    raise UnsupportedError(f"dense decode: no backend takes the problem; {'; '.join(reasons)}")


def why_no_kernel(problem: DenseDecodeProblem) -> str | None:
    """None when an allowed backend other than the reference serves `problem`, else the reason of each."""
    reasons = {}
    for backend in (CUDA, TRITON):
        if override in (None, REFERENCE, backend):
            reason = _reason(backend, problem)
            if reason is None:
                return None
            reasons[backend.name] = reason
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def behind_cuda(tensor: torch.Tensor) -> Operators | None:
    """Operators for a plan or a merge that the native library declined on this device, or None under an override."""
    if override is not None:
        return None
    serves = tensor.is_cuda and triton.serves(tensor.device)
    return TRITON.operators if serves else REFERENCE.operators


def _reason(backend: Backend, problem: DenseDecodeProblem) -> str | None:
    """Why `backend` does not serve `problem`, or None."""
    if backend is TRITON and override is None and problem.device_type != "cuda":
        return "only its interpreter serves tensors on the CPU, which is for tests: ask for the backend by name"
    return backend.why_not(problem)


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
    "TRITON",
    "Backend",
    "Operators",
    "active",
    "cuda",
    "cuda_missing",
    "override",
    "reference",
    "select",
    "set_backend",
    "triton",
    "use",
    "why_no_kernel",
]
