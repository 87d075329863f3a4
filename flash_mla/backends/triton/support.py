"""Where the Triton backend runs and what it takes. Imports no Triton."""

import importlib.util
from functools import lru_cache
from importlib import metadata

import torch

from flash_mla import problem, problem_prefill
from flash_mla.backends.triton import config
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillBackwardProblem, SparsePrefillProblem

_Attention = DenseDecodeProblem | SparseDecodeProblem | SparsePrefillProblem | DensePrefillProblem

OLDEST, TOO_NEW = (3, 4), (3, 10)
"""Versions of Triton that the kernels are written for, as pyproject.toml pins them: from the first, below the
second.
"""

MIN_CAPABILITY = 80
"""bfloat16 on tensor cores."""

NO_GRADIENTS = "has no kernel for gradients: the reference computes those of its calls"


@lru_cache(maxsize=1)
def missing() -> str | None:
    """None when a Triton that the kernels are written for is installed, else the reason."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install 'flash_mla[triton]')"
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:  # vendored under another distribution's name
        return None
    if not OLDEST <= tuple(map(int, version.split(".")[:2])) < TOO_NEW:
        oldest, newest = (".".join(map(str, pair)) for pair in (OLDEST, TOO_NEW))
        return f"triton must be at least {oldest} and below {newest}, version {version} is installed"
    return None


def why_not_on(device_type: str, compute_capability: int | None) -> str | None:
    """None when the kernels run on such a device, else the reason."""
    reason = missing()
    if reason is not None:
        return reason
    if config.interpreting():
        return None
    if device_type != "cuda":
        return f"the tensors are on {device_type} (TRITON_INTERPRET=1 in the environment runs the interpreter there)"
    if compute_capability is not None and compute_capability < MIN_CAPABILITY and torch.version.hip is None:
        return f"needs compute capability 8.0 or newer, the GPU has {compute_capability / 10}"
    return None


def why_not(wanted: Problem) -> str | None:
    """None when a kernel takes `wanted`, else the reason."""
    if isinstance(wanted, problem_prefill.DensePrefillBackwardProblem | SparsePrefillBackwardProblem):
        return NO_GRADIENTS
    reason = why_not_on(wanted.device_type, wanted.compute_capability)
    if reason is not None or not isinstance(wanted, _Attention):
        return reason
    return _why_not_dtype(wanted) or _why_not_sizes(wanted)


def _why_not_dtype(wanted: _Attention) -> str | None:
    over_bytes = isinstance(wanted, DenseDecodeProblem) and wanted.fp8_cache is not None
    if isinstance(wanted, SparseDecodeProblem | SparsePrefillProblem) or over_bytes:
        return None
    if wanted.dtype not in problem.HALF_DTYPES:
        return f"dtype must be bfloat16 or float16, got {str(wanted.dtype).removeprefix('torch.')}"
    return None


def _why_not_sizes(wanted: _Attention) -> str | None:
    is_mha = isinstance(wanted, DensePrefillProblem)
    sizes = problem_prefill.HEAD_DIMS_QK if is_mha else problem.HEAD_DIMS_QK
    if wanted.d_qk not in sizes:
        return f"d_qk must be {' or '.join(map(str, sorted(sizes, reverse=True)))}, got {wanted.d_qk}"
    if isinstance(wanted, SparsePrefillProblem):
        return None if 1 <= wanted.d_v <= wanted.d_qk else f"d_v must be 1 to {wanted.d_qk}, got {wanted.d_v}"
    d_v = problem_prefill.HEAD_DIM_V if is_mha else problem.HEAD_DIM_V
    return None if wanted.d_v == d_v else f"d_v must be {d_v}, got {wanted.d_v}"


def serves(device: torch.device) -> bool:
    """Whether the kernels run on this CUDA device."""
    major, minor = torch.cuda.get_device_capability(device)
    return why_not_on("cuda", 10 * major + minor) is None
