"""Capability queries: what serves a call, and what the kernels of this build can do."""

from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from flash_mla import backends
from flash_mla.backends import cuda
from flash_mla.errors import wanted
from flash_mla.problem import DenseDecodeProblem

OPERATIONS = ("dense_decode", "sparse_decode", "sparse_prefill", "dense_prefill")


def why_not(op: str, problem: DenseDecodeProblem | None = None, **call: Any) -> str | None:
    """Why no kernel, of CUDA or Triton, serves a call; None when one does.

    Under `backends.use(...)` or `FLASH_MLA_BACKEND` only the backend named there is asked.

    Args:
        op: "dense_decode" (`flash_mla_with_kvcache` without indices), "sparse_decode", "sparse_prefill" or
            "dense_prefill".
        problem: what is asked for, as a value; or else
        **call: `q=` and `k_cache=` tensors and, if they matter, `head_dim_v=` and `softmax_scale=`. Other arguments
            of the call may stand there too and are not looked at.

    Returns:
        None, or a text that lists each candidate kernel and its reason. The reference backend is not asked: it serves
        every call.

    Raises:
        ValueError: no such `op`.
        TypeError: neither a problem nor both tensors.
    """
    if op not in OPERATIONS:
        raise ValueError(wanted("op", " or ".join(OPERATIONS), repr(op)))
    if op != "dense_decode":
        return f"{op} is not built yet in this version of flash_mla"
    if problem is None:
        q, k_cache = call.get("q"), call.get("k_cache")
        if not isinstance(q, torch.Tensor) or not isinstance(k_cache, torch.Tensor):
            raise TypeError(wanted("why_not", "a DenseDecodeProblem, or the tensors q= and k_cache=", sorted(call)))
        known = {name: call[name] for name in ("head_dim_v", "softmax_scale") if name in call}
        problem = DenseDecodeProblem.of(q, k_cache, **known)
    return backends.why_no_kernel(problem)


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
