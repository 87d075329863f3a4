"""Dense prefill over variable-length sequences: what the choice of a kernel depends on, and the checks."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_mla import arguments, problem
from flash_mla.errors import wanted

HEAD_DIMS_QK = (128, 192)
HEAD_DIM_V = 128


@dataclass(frozen=True)
class DensePrefillProblem:
    """What the choice of a dense prefill kernel depends on."""

    op: ClassVar[str] = "dense_prefill"

    device_type: str
    compute_capability: int | None
    dtype: torch.dtype
    """Of q, k and v."""
    sequences: int
    h_q: int
    h_kv: int
    d_qk: int
    d_v: int
    causal: bool
    deterministic: bool
    needs_gradient: bool
    softmax_scale: float

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_qo: Tensor,
        causal: bool = False,
        deterministic: bool = False,
        softmax_scale: float | None = None,
    ) -> "DensePrefillProblem":
        """The problem of a `flash_attn_varlen_func` call with these tensors."""
        _, h_q, d_qk = q.shape
        gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (q, k, v))
        where = problem.device_of(q)
        sequences = cu_seqlens_qo.shape[0] - 1
        shape = (sequences, h_q, k.shape[1], d_qk, v.shape[2])
        scale = problem.default_softmax_scale(d_qk) if softmax_scale is None else softmax_scale
        return cls(*where, q.dtype, *shape, causal, deterministic, gradient, scale)


@dataclass(frozen=True)
class DensePrefillBackwardProblem(DensePrefillProblem):
    """The same for the gradients of q, k and v."""

    op: ClassVar[str] = "dense_prefill_backward"


def check_dense_prefill(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_qo: Any,
    cu_seqlens_kv: Any,
    max_seqlen_qo: Any,
    max_seqlen_kv: Any,
    softmax_scale: Any,
    causal: Any,
    deterministic: Any,
) -> None:
    """Check the arguments of `torch.ops.flash_mla.dense_prefill`.

    Raises:
        ValueError, TypeError: naming the wrong argument.
    """
    _check_query(q)
    _, h_q, d_qk = q.shape
    _check_key_or_value("k", k, q, "d_qk", d_qk)
    _check_key_or_value("v", v, q, "d_v", HEAD_DIM_V)
    if v.shape[:2] != k.shape[:2]:
        given = list(v.shape[:2])
        raise ValueError(wanted("v", f"[tokens_kv, h_kv] = {list(k.shape[:2])}, like k", given))
    if h_q % k.shape[1] != 0:
        raise ValueError(wanted("q", f"h_q that is a multiple of h_kv = {k.shape[1]}", f"h_q = {h_q}"))
    for name, running in {"cu_seqlens_qo": cu_seqlens_qo, "cu_seqlens_kv": cu_seqlens_kv}.items():
        _check_running_lengths(name, running, q.device)
    if cu_seqlens_kv.shape != cu_seqlens_qo.shape:
        meaning = f"shape [sequences + 1] = {list(cu_seqlens_qo.shape)}, like cu_seqlens_qo"
        raise ValueError(wanted("cu_seqlens_kv", meaning, list(cu_seqlens_kv.shape)))
    arguments.check_int("max_seqlen_qo", max_seqlen_qo, least=0)
    arguments.check_int("max_seqlen_kv", max_seqlen_kv, least=0)
    arguments.check_scale(softmax_scale)
    arguments.check_flag("causal", causal)
    arguments.check_flag("deterministic", deterministic)


def check_dropout(dropout_p: Any, is_varlen: Any) -> None:
    """Check the arguments of `flash_attn_varlen_func` that the operator does not have."""
    arguments.check_scale(dropout_p, "dropout_p")
    if dropout_p != 0:
        raise ValueError(wanted("dropout_p", "0.0 (there is no dropout)", dropout_p))
    arguments.check_flag("is_varlen", is_varlen)


def check_packed(name: str, packed: Any, head_dim_qk: Any, copies: int) -> None:
    """Check a tensor that holds `copies` parts of head_dim_qk values and one of 128 in its last dimension."""
    arguments.check_int("head_dim_qk", head_dim_qk)
    arguments.check_one_of("head_dim_qk", head_dim_qk, HEAD_DIMS_QK)
    width = copies * head_dim_qk + HEAD_DIM_V
    arguments.check_tensor(name, packed, 3, f"[tokens, heads, {width}]")
    if packed.shape[-1] != width:
        parts = " + ".join([f"head_dim_qk = {head_dim_qk}"] * copies)
        raise ValueError(wanted(name, f"a last dimension of {parts} + {HEAD_DIM_V} = {width}", packed.shape[-1]))


def _check_query(q: Any) -> None:
    arguments.check_tensor("q", q, 3, "[tokens_q, h_q, d_qk]")
    arguments.check_dtype("q", q, problem.HALF_DTYPES)
    if q.shape[-1] not in HEAD_DIMS_QK:
        raise ValueError(wanted("q", "d_qk (last dimension) 192 or 128", q.shape[-1]))
    if q.shape[1] < 1:
        raise ValueError(wanted("q", "h_q of at least 1", f"shape {list(q.shape)}"))
    arguments.check_last_stride("q", q)


def _check_key_or_value(name: str, value: Any, q: Tensor, dimension: str, size: int) -> None:
    arguments.check_tensor(name, value, 3, f"[tokens_kv, h_kv, {dimension}]")
    if value.dtype != q.dtype:
        raise TypeError(wanted(name, f"{q.dtype}, like q", value.dtype))
    arguments.check_device(name, value, q.device)
    if value.shape[-1] != size:
        raise ValueError(wanted(name, f"a last dimension of {dimension} = {size}", value.shape[-1]))
    if value.shape[1] < 1:
        raise ValueError(wanted(name, "h_kv of at least 1", f"shape {list(value.shape)}"))
    arguments.check_last_stride(name, value)


def _check_running_lengths(name: str, running: Any, device: torch.device) -> None:
    arguments.check_tensor(name, running, 1, "[sequences + 1]")
    arguments.check_dtype(name, running, (torch.int32,))
    if running.shape[0] < 1:
        raise ValueError(wanted(name, "shape [sequences + 1], at least one number", list(running.shape)))
    arguments.check_contiguous(name, running)
    arguments.check_device(name, running, device)
