"""The CUDA backend: the kernel table of the native library, asked from Python.

The table itself is C++ (`csrc/sm90/kernels.cpp`): which kernels exist, what each takes, and why it does not take the
rest.
"""

import torch

from flash_mla import _ops
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem

_SCALAR_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_OTHER_SCALAR_TYPE = 2

WITHOUT_KERNELS = ("dense_decode_fp8", "sparse_decode", "sparse_prefill", "dense_prefill")
"""Operations, and variants of them, that no architecture has kernels for so far."""


def missing() -> str | None:
    """None when the native library is loaded, else the reason."""
    return _ops.why_not_loaded


def dense_decode_table(problem: DenseDecodeProblem) -> dict[str, str]:
    """Every dense decode kernel of the native library, in order of preference, with its reason against `problem`
    ("" where it takes it). Empty without the library."""
    if _ops.why_not_loaded is not None:
        return {}
    text: str = torch.ops.flash_mla.dense_decode_why_not(
        problem.compute_capability or 0,
        _SCALAR_TYPES.get(problem.dtype, _OTHER_SCALAR_TYPE),
        problem.b,
        problem.s_q,
        problem.h_q,
        problem.h_kv,
        problem.d_qk,
        problem.d_v,
        problem.page_block_size,
        problem.softmax_scale,
    )
    table = {}
    for line in filter(None, text.splitlines()):
        name, _, reason = line.partition("\t")
        table[name] = reason
    return table


def why_not(problem: Problem) -> str | None:
    """None when some CUDA kernel takes `problem`, else every kernel with its reason."""
    if problem.device_type != "cuda":
        return f"the tensors are on {problem.device_type}"
    if _ops.why_not_loaded is not None:
        return _ops.why_not_loaded
    if isinstance(problem, KVCacheProblem):
        return torch.ops.flash_mla.kv_cache_why_not(problem.compute_capability or 0) or None
    if not isinstance(problem, DenseDecodeProblem):
        return _ops.no_kernels(problem.op)
    if problem.fp8_cache is not None:
        return _ops.no_kernels("dense_decode_fp8")
    table = dense_decode_table(problem)
    if any(reason == "" for reason in table.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in table.items())
