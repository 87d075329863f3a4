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

from flash_mla._ops import why_not_native
from flash_mla.backends import cuda, reference, triton
from flash_mla.errors import UnsupportedError, from_native, wanted
from flash_mla.problem import Problem


@dataclass(frozen=True)
class Operators:
    """The operators that calls go to."""

    dense_decode: Callable[..., Any]
    dense_decode_out: Callable[..., Any]
    plan_dense_decode: Callable[..., Any]
    merge_attention_states: Callable[..., Any]
    dense_decode_fp8: Callable[..., Any]
    dense_decode_fp8_out: Callable[..., Any]
    sparse_decode: Callable[..., Any]
    sparse_decode_out: Callable[..., Any]
    plan_sparse_decode: Callable[..., Any]
    sparse_prefill: Callable[..., Any]
    sparse_prefill_out: Callable[..., Any]
    dense_prefill: Callable[..., Any]
    append_kv_cache: Callable[..., Any]
    dequantize_kv_cache: Callable[..., Any]

    @staticmethod
    def made_by(make: Callable[[str], Callable[..., Any]]) -> "Operators":
        """All of them, each made from its name."""
        return Operators(**{field.name: make(field.name) for field in fields(Operators)})


@dataclass(frozen=True)
class Backend:
    """One way to serve calls."""

    name: str
    why_not: Callable[[Any], str | None]
    """None, or why the backend does not take the problem."""
    operators: Operators


def _registered(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.flash_mla, name).default
    return op


def _cuda_only(name: str) -> Callable[..., Any]:
    """An operator for CUDA tensors, `UnsupportedError` for others: calls that nothing else may serve."""
    op = _registered(name)
    missing = why_not_native(name)

    def call(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, (list, tuple)) else first
        if isinstance(tensor, torch.Tensor) and not tensor.is_cuda:
            raise UnsupportedError(f"backend cuda: the tensors are on {tensor.device.type}")
        if missing is not None:
            raise UnsupportedError(f"backend cuda: {missing}")
        return op(first, *rest)

    return call


def _triton_first(name: str) -> Callable[..., Any]:
    """An operator with CUDA tensors handed to Triton: what is called in place of a missing native library.

    Where Triton does not run either, its operator raises `UnsupportedError`, and the reference is next.
    """
    op, through_triton = _registered(name), _registered(f"triton_{name}")

    def call(first: Any, *rest: Any) -> Any:
        tensor = first[0] if isinstance(first, (list, tuple)) and first else first
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            return through_triton(first, *rest)
        return op(first, *rest)

    return call


cuda_missing = cuda.missing()
"""None when the native library is loaded, else the reason."""

# torch dispatches by device: to the native library, or without it to the reference, unless Triton can take its place.
AUTOMATIC = Operators.made_by(_registered if cuda_missing is None or triton.missing() is not None else _triton_first)
"""What serves while no backend is asked for by name."""

CUDA = Backend("cuda", cuda.why_not, Operators.made_by(_cuda_only))
TRITON = Backend("triton", triton.why_not, Operators.made_by(lambda name: _registered(f"triton_{name}")))
REFERENCE = Backend("reference", lambda problem: None, Operators.made_by(lambda name: _registered(f"reference_{name}")))

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


def select(problem: Problem, behind: Backend | None = None) -> Backend:
    """The backend that serves `problem`: the first allowed one that has nothing against it.

    `behind`: only those that follow this one in the registry.

    Raises:
        UnsupportedError: none takes it; the text lists every candidate and its reason.
    """
    reasons = {}
    allowed = REGISTRY if override is None else (override,)
    for backend in allowed[allowed.index(behind) + 1 :] if behind in allowed else allowed:
        reason = _reason(backend, problem)
        if reason is None:
            return backend
        reasons[backend.name] = reason
    raise UnsupportedError(f"{problem.op.replace('_', ' ')}: no backend takes the problem; {listed(reasons)}")


def _reason(backend: Backend, problem: Problem) -> str | None:
    """Why `backend` does not serve `problem`, or None."""
    reason = backend.why_not(problem)
    if reason is None and backend is TRITON and override is not TRITON and problem.device_type != "cuda":
        return "only its interpreter serves tensors on the CPU, which is for tests: ask for the backend by name"
    return reason


def listed(reasons: dict[str, str]) -> str:
    """The text of several backends' reasons."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def with_kernels() -> list[Backend]:
    """The backends that a capability query asks: all but the reference, or the one that alone is allowed."""
    return [backend for backend in (CUDA, TRITON) if override in (None, REFERENCE, backend)]


def why_no_kernel(problem: Problem) -> str | None:
    """None when one of `with_kernels` takes `problem`, else the reason of each."""
    reasons = {}
    for backend in with_kernels():
        reason = _reason(backend, problem)
        if reason is None:
            return None
        reasons[backend.name] = reason
    return listed(reasons)


def serve(op: str, check: Callable[..., None], problem_of: Callable[..., Problem], *arguments: Any) -> Any:
    """Call operator `op`; where it refuses, find the words, or the backend that takes what no kernel does.

    The operators check their arguments themselves, so nothing stands before them. Only an operator that declined
    before any launch, with `UnsupportedError`, is asked for again elsewhere.

    Args:
        op: field of `Operators`.
        check: raises the error that names the wrong argument, from the operator's arguments.
        problem_of: what the call asks for, from the operator's arguments.
        *arguments: of the operator.

    Raises:
        ValueError, TypeError: of `check`.
        UnsupportedError: no backend takes the call.
    """
    try:
        return getattr(active, op)(*arguments)
    except Exception as error:
        check(*arguments)
        failure = from_native(error)
        if not isinstance(failure, UnsupportedError):
            raise failure from None
        return getattr(after(failure, problem_of(*arguments)).operators, op)(*arguments)


def after(failure: UnsupportedError, problem: Problem) -> Backend:
    """The backend that takes over when an operator declined before any launch: Triton, or the reference with a warning.

    Raises:
        UnsupportedError: one backend alone is allowed; the text has its reason against the problem, or is `failure`'s.
    """
    if override is not None:
        select(problem)
        raise failure from None
    backend = select(problem, behind=CUDA)
    if backend is REFERENCE:
        reference.warn_once(CUDA.why_not(problem) or str(failure))
    return backend


def behind_cuda(failure: Exception, tensor: torch.Tensor) -> Operators:
    """`after` for a plan or a merge: the operators to call instead, of a backend that takes any call where it runs.

    Raises:
        Exception: `failure`, where it is no `UnsupportedError` or one backend alone is allowed.
    """
    if override is not None or not isinstance(failure, UnsupportedError):
        raise failure from None
    if tensor.is_cuda and triton.serves(tensor.device):
        return TRITON.operators
    reference.warn_once(str(failure))
    return REFERENCE.operators


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
    "after",
    "behind_cuda",
    "cuda",
    "cuda_missing",
    "listed",
    "override",
    "reference",
    "select",
    "serve",
    "set_backend",
    "triton",
    "use",
    "why_no_kernel",
    "with_kernels",
]
