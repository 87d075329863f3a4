"""The CUDA backend: the kernel tables of the native library, asked from Python.

The tables themselves are C++ (`kernels.cpp` of `csrc/sm90` and `csrc/sm100`): which kernels exist, what each takes, and
why it does not take the rest.
"""

from typing import Any

import torch

from flash_mla import _ops
from flash_mla.kv_format import KVFormat
from flash_mla.problem import FP8, HEAD_DIM_V, DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import DensePrefillBackwardProblem, DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillBackwardProblem, SparsePrefillProblem

_SCALAR_TYPES = {torch.bfloat16: 0, torch.float16: 1}
_OTHER_SCALAR_TYPE = 2

# The values of KVFormat in csrc/core/kv_format.h.
_FORMATS = {
    known: value
    for value, known in enumerate(
        (KVFormat.BF16, KVFormat.V32, KVFormat.V32_NO_ROPE, KVFormat.MODEL1, KVFormat.V41, KVFormat.V41_FP4)
    )
}
# e4m3 values with one scale for the whole cache, by d_qk.
_ONE_SCALE = {576: len(_FORMATS), 512: len(_FORMATS) + 1}
_NO_FORMAT = len(_FORMATS) + len(_ONE_SCALE)


def missing() -> str | None:
    """None when the native library is loaded, else the reason."""
    return _ops.why_not_loaded


def kernel_table(problem: Problem) -> dict[str, str]:
    """Every kernel of the native library for the operation, in order of preference, with its reason against `problem`
    ("" where it takes it). Empty where the library has no kernels for it, and without the library."""
    if _ops.why_not_loaded is not None or why_no_operator(problem) is not None:
        return {}
    if isinstance(problem, SparseDecodeProblem):
        return _parsed(torch.ops.flash_mla.sparse_decode_why_not(*_sparse_arguments(problem)))
    if isinstance(problem, SparsePrefillBackwardProblem):
        return _parsed(torch.ops.flash_mla.sparse_prefill_backward_why_not(*_sparse_backward_arguments(problem)))
    if isinstance(problem, SparsePrefillProblem):
        return _parsed(torch.ops.flash_mla.sparse_decode_why_not(*_sparse_prefill_arguments(problem)))
    if isinstance(problem, DensePrefillBackwardProblem):
        return _parsed(torch.ops.flash_mla.dense_prefill_backward_why_not(*_dense_prefill_arguments(problem)))
    if isinstance(problem, DensePrefillProblem):
        return _parsed(torch.ops.flash_mla.dense_prefill_why_not(*_dense_prefill_arguments(problem)))
    if not isinstance(problem, DenseDecodeProblem):
        return {}
    if problem.fp8_cache is not None:
        return _parsed(torch.ops.flash_mla.sparse_decode_why_not(*_fp8_arguments(problem)))
    return _parsed(torch.ops.flash_mla.dense_decode_why_not(*_dense_arguments(problem)))


def _parsed(text: str) -> dict[str, str]:
    table = {}
    for line in filter(None, text.splitlines()):
        name, _, reason = line.partition("\t")
        table[name] = reason
    return table


def _dense_arguments(problem: DenseDecodeProblem) -> tuple[Any, ...]:
    return (
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


def _dense_prefill_arguments(problem: DensePrefillProblem) -> tuple[Any, ...]:
    return (
        problem.compute_capability or 0,
        _SCALAR_TYPES.get(problem.dtype, _OTHER_SCALAR_TYPE),
        problem.h_q,
        problem.h_kv,
        problem.d_qk,
        problem.d_v,
        problem.softmax_scale,
    )


def _fp8_arguments(problem: DenseDecodeProblem) -> tuple[Any, ...]:
    one_scale = problem.fp8_cache == "E4M3"
    # Beside such a cache an FP8 q is widened for the kernels.
    dtype = torch.bfloat16 if one_scale and problem.dtype == FP8 else problem.dtype
    return (
        problem.compute_capability or 0,
        _SCALAR_TYPES.get(dtype, _OTHER_SCALAR_TYPE),
        _ONE_SCALE.get(problem.d_qk, _NO_FORMAT) if one_scale else _FORMATS[KVFormat(problem.fp8_cache)],
        _NO_FORMAT,
        True,
        problem.b,
        problem.s_q,
        problem.h_q,
        problem.h_kv,
        problem.d_qk,
        problem.d_v,
        problem.page_block_size,
        0,
        0,
        0,
        problem.softmax_scale,
    )


def _sparse_arguments(problem: SparseDecodeProblem) -> tuple[Any, ...]:
    return (
        problem.compute_capability or 0,
        _SCALAR_TYPES[torch.bfloat16],
        _FORMATS[problem.kv_format],
        _NO_FORMAT if problem.extra_kv_format is None else _FORMATS[problem.extra_kv_format],
        False,
        problem.b,
        problem.s_q,
        problem.h_q,
        1,
        problem.d_qk,
        problem.d_v,
        problem.page_block_size,
        problem.extra_page_block_size or 0,
        problem.topk,
        problem.extra_topk,
        problem.softmax_scale,
    )


def _sparse_prefill_arguments(problem: SparsePrefillProblem) -> tuple[Any, ...]:
    """Sparse prefill is served by the kernels of sparse decode, which compute 512 columns of V or none."""
    return (
        problem.compute_capability or 0,
        _SCALAR_TYPES[torch.bfloat16],
        _FORMATS[problem.kv_format],
        _NO_FORMAT if problem.extra_kv_format is None else _FORMATS[problem.extra_kv_format],
        False,
        1,
        problem.s_q,
        problem.h_q,
        1,
        problem.d_qk,
        max(problem.d_v, HEAD_DIM_V),
        1,
        0 if problem.extra_kv_format is None else 1,
        problem.topk,
        problem.extra_topk,
        problem.sm_scale,
    )


def _sparse_backward_arguments(problem: SparsePrefillBackwardProblem) -> tuple[Any, ...]:
    return (
        problem.compute_capability or 0,
        _FORMATS[problem.kv_format],
        _NO_FORMAT if problem.extra_kv_format is None else _FORMATS[problem.extra_kv_format],
        problem.h_q,
        problem.d_qk,
        problem.d_v,
        problem.sm_scale,
    )


def why_no_kernels(op: str) -> str | None:
    """None when the native library has kernels for an operation, or this variant of one, else the reason."""
    return _ops.why_not_native("append_kv_cache" if op == "kv_cache" else op)


def why_no_operator(problem: Problem) -> str | None:
    """None when the native library has kernels for the operation of `problem`, of whatever kind, else the reason."""
    fp8 = isinstance(problem, DenseDecodeProblem) and problem.fp8_cache
    return why_no_kernels("dense_decode_fp8" if fp8 else problem.op)


def why_not(problem: Problem) -> str | None:
    """None when some CUDA kernel takes `problem`, else every kernel with its reason."""
    if problem.device_type != "cuda":
        return f"the tensors are on {problem.device_type}"
    reason = missing() or why_no_operator(problem)
    if reason is not None:
        return reason
    if isinstance(problem, KVCacheProblem):
        return torch.ops.flash_mla.kv_cache_why_not(problem.compute_capability or 0) or None
    table = kernel_table(problem)
    if not table:
        return f"no kernel of the architectures that are built ({_ops.build_info()['archs']}) is for it"
    if any(reason == "" for reason in table.values()):
        return None
    return "; ".join(f"{name}: {reason}" for name, reason in table.items())
