"""The operators `torch.ops.flash_mla.*`: loading, schemas, fake (meta) functions, autograd.

The native library registers the operators for CUDA. Where it is missing the same schemas are defined from here, so that
the package works, compiles and passes `opcheck` with the reference backend alone. Every operator `x` has a twin
`reference_x` that runs the reference on any device; `flash_mla.backends.reference` registers both. Those that Triton
serves have a twin `triton_x` too, which `flash_mla.backends.triton.operators` defines.
"""

import os
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_mla import _schemas, problem, problem_sparse

NAMESPACE = "flash_mla"

_ops: Any = torch.ops
_library: Any = torch.library  # not fully typed

_DENSE_DECODE_INPUTS = (
    "Tensor q, Tensor k_cache, Tensor block_table, Tensor cache_seqlens, Tensor? tile_scheduler_metadata, "
    "Tensor? num_splits, Tensor? attn_sink, int head_dim_v, float softmax_scale, bool causal, bool batch_invariant"
)

# The native library declares the same text in csrc/api/library.cpp; a test compares the two.
SCHEMAS = {
    "dense_decode": f"({_DENSE_DECODE_INPUTS}) -> (Tensor, Tensor)",
    "dense_decode_out": f"({_DENSE_DECODE_INPUTS}, Tensor(a!) out, Tensor(b!) lse) -> ()",
    "plan_dense_decode": "(Tensor cache_seqlens, int s_q, int h_q, int h_kv) -> (Tensor, Tensor)",
    "merge_attention_states": "(Tensor[] outs, Tensor[] lses) -> (Tensor, Tensor)",
    **_schemas.SCHEMAS,
}


def library_path() -> Path:
    """Where the native library is looked for: `FLASH_MLA_LIBRARY`, else beside this file."""
    override = os.environ.get("FLASH_MLA_LIBRARY")
    return Path(override) if override else Path(__file__).with_name("libflash_mla.so")


def _load() -> str | None:
    """Load the native library. Returns None, or the reason why there is none."""
    path = library_path()
    if not path.is_file():
        if "FLASH_MLA_LIBRARY" in os.environ:
            raise ImportError(f"FLASH_MLA_LIBRARY: wanted a shared library, got {path}, which is not a file")
        return f"the CUDA library is not built ({path.name} is missing from the package)"
    try:
        _ops.load_library(str(path))
    except OSError as error:
        reason = f"the CUDA library {path} does not load: {error}"
        warnings.warn(f"flash_mla: {reason}", RuntimeWarning, stacklevel=2)
        return reason
    return None


why_not_loaded: str | None = _load()
"""None when the native library is loaded, else the reason."""

NATIVE = frozenset(name for name in SCHEMAS if hasattr(_ops.flash_mla, name))
"""Operators that the native library has. It may have kernels for some of them only."""

_definitions = _library.Library(NAMESPACE, "FRAGMENT")


def implement(name: str, function: Any, key: str) -> None:
    """Register `function` as the implementation of operator `name` for dispatch key `key`."""
    _definitions.impl(name, function, key)


def build_info() -> dict[str, str]:
    """How the native library was built: version, cuda, archs, torch_target, and a note on what has not been run on the
    hardware that it is for. Empty without the library."""
    if why_not_loaded is not None:
        return {}
    lines = _ops.flash_mla.build_info().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line)


def num_sm_parts(device: torch.device, s_q: int, h_q: int, h_kv: int) -> int:
    """Number of rows that `plan_dense_decode` makes on `device`."""
    if device.type != "cuda" or why_not_loaded is not None:
        return problem.REFERENCE_PARTS
    index = torch.cuda.current_device() if device.index is None else device.index
    return int(_ops.flash_mla.num_sm_parts(index, s_q, h_q, h_kv))


def num_sparse_parts(device: torch.device, s_q: int, h_q: int) -> int:
    """Number of rows that `plan_sparse_decode` makes on `device`: row tiles are of one query token each."""
    if "plan_sparse_decode" not in NATIVE:
        return problem.REFERENCE_PARTS
    tiles = s_q * -(-h_q // problem.ROW_TILE)
    return num_sm_parts(device, tiles, problem.ROW_TILE, 1)


def _fake_dense_decode(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    tile_scheduler_metadata: Tensor | None,
    num_splits: Tensor | None,
    attn_sink: Tensor | None,
    head_dim_v: int,
    softmax_scale: float,
    causal: bool,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    problem.check_dense_decode(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        tile_scheduler_metadata,
        num_splits,
        attn_sink,
        head_dim_v,
        softmax_scale,
        causal,
        batch_invariant,
    )
    b, s_q, h_q, _ = q.shape
    return q.new_empty((b, s_q, h_q, head_dim_v)), q.new_empty((b, h_q, s_q), dtype=torch.float32)


def _fake_dense_decode_out(*args: Any) -> None:
    problem.check_dense_decode(*args)


def _fake_plan(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> tuple[Tensor, Tensor]:
    problem.check_plan(cache_seqlens, s_q, h_q, h_kv)
    parts = num_sm_parts(cache_seqlens.device, s_q, h_q, h_kv)
    b = cache_seqlens.shape[0]
    return cache_seqlens.new_empty((parts, problem.ROW_FIELDS)), cache_seqlens.new_empty((b + 1,))


def _fake_reference_plan(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> tuple[Tensor, Tensor]:
    problem.check_plan(cache_seqlens, s_q, h_q, h_kv)
    b = cache_seqlens.shape[0]
    return cache_seqlens.new_empty((problem.REFERENCE_PARTS, problem.ROW_FIELDS)), cache_seqlens.new_empty((b + 1,))


def _fake_sparse_plan(
    requests: Tensor,
    topk_length: Tensor | None,
    extra_topk_length: Tensor | None,
    s_q: int,
    h_q: int,
    topk: int,
    extra_topk: int,
) -> tuple[Tensor, Tensor]:
    problem_sparse.check_sparse_plan(requests, topk_length, extra_topk_length, s_q, h_q, topk, extra_topk)
    return _schemas.sparse_plan_of(requests, num_sparse_parts(requests.device, s_q, h_q))


def _fake_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    problem.check_merge(outs, lses)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def why_not_native(name: str) -> str | None:
    """None when the native library has operator `name`, else the reason."""
    if why_not_loaded is not None or name in NATIVE:
        return why_not_loaded
    return f"no CUDA kernel for {name} is built yet in this version of flash_mla"


_FAKES: dict[str, Any] = {
    "dense_decode": _fake_dense_decode,
    "dense_decode_out": _fake_dense_decode_out,
    "plan_dense_decode": _fake_plan,
    "merge_attention_states": _fake_merge,
    **_schemas.FAKES,
    "plan_sparse_decode": _fake_sparse_plan,
}

_REFERENCE_PLANS = {
    "plan_dense_decode": _fake_reference_plan,
    "plan_sparse_decode": _schemas.FAKES["plan_sparse_decode"],
}


def define_twins(backend: str, names: Collection[str], fake_plans: dict[str, Any]) -> None:
    """Define `<backend>_x` for these operators `x`: the same schemas, to be served by one backend whatever the device.

    Where the backend has no `x_backward`, gradients are those of the operator `x`, if no kernel may decline them, else
    the reference's.

    `fake_plans`: the fake functions of operators that plan, since the size of a plan is the backend's own.
    """
    for name in names:
        _definitions.define(f"{backend}_{name}{SCHEMAS[name]}")
        fake = fake_plans.get(name, _FAKES[name])
        _library.register_fake(f"{NAMESPACE}::{backend}_{name}", fake, lib=_definitions)
    for name in names:
        backward = f"{name}_backward"
        if backward in names:
            backward = f"{backend}_{backward}"
        elif backward in NATIVE:
            backward = f"reference_{backward}"
        _register_autograd(name, f"{backend}_{name}", backward)


def _register() -> None:
    """Define what the library has not, then attach fake functions and autograd behaviour to every operator."""
    for name, schema in SCHEMAS.items():
        if name not in NATIVE:
            _definitions.define(name + schema)
        _library.register_fake(f"{NAMESPACE}::{name}", _FAKES[name], lib=_definitions)
    for name in SCHEMAS:
        _register_autograd(name, name, f"{name}_backward")
    define_twins("reference", SCHEMAS, _REFERENCE_PLANS)


def _backward_op(backward: str) -> Any:
    """Operator `backward`, or the reference's where it has kernels, but none for the call."""
    op = getattr(_ops.flash_mla, backward).default
    if backward != "sparse_prefill_backward" or backward not in NATIVE:
        return op

    def serve(d_out: Tensor, d_lse: Tensor, q: Tensor, *rest: Any) -> Any:
        from flash_mla.backends import cuda
        from flash_mla.backends import reference as reference_backend

        kv, indices, _, extra, extra_indices, _, _, kv_format, _, sm_scale = rest[:10]
        wanted = problem_sparse.SparsePrefillBackwardProblem.of(
            q, kv, indices, d_out.shape[-1], extra, extra_indices, kv_format, sm_scale
        )
        reason = cuda.why_not(wanted) if q.is_cuda else None
        if reason is None:
            return op(d_out, d_lse, q, *rest)
        reference_backend.warn_once(reason)
        return _ops.flash_mla.reference_sparse_prefill_backward(d_out, d_lse, q, *rest)

    return serve


def _register_autograd(name: str, op: str, backward: str) -> None:
    """The gradient of operator `op`, which is `name` or its twin: by operator `backward`, where it has one."""
    if name in _schemas.GRADIENTS:
        gradient = _schemas.GRADIENTS[name](_backward_op(backward))
        _library.register_autograd(
            f"{NAMESPACE}::{op}", gradient.backward, setup_context=gradient.setup_context, lib=_definitions
        )
    else:
        # Decoding is not differentiable: results never require a gradient. A fallthrough also saves the host time of
        # torch's boxed autograd fallback.
        _definitions.impl(op, _library.fallthrough_kernel, "Autograd")


_register()
