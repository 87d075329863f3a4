"""Inputs of dense prefill over sequences laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from flash_mla.backends import reference_prefill
from flash_mla.problem import default_softmax_scale
from flash_mla.problem_prefill import HEAD_DIM_V
from flash_mla.testing.inputs import Answer


@dataclass
class DensePrefillInputs:
    """The tensors of one dense prefill call."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_qo: Tensor
    cu_seqlens_kv: Tensor
    max_seqlen_qo: int
    max_seqlen_kv: int
    causal: bool = False
    softmax_scale: float | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments for `flash_attn_varlen_func`."""
        return dict(vars(self))

    def sequence(self, index: int) -> "DensePrefillInputs":
        """The same call for one of the sequences."""
        (begin, end), (kv_begin, kv_end) = (
            running[index : index + 2].tolist() for running in (self.cu_seqlens_qo, self.cu_seqlens_kv)
        )
        return replace(
            self,
            q=self.q[begin:end],
            k=self.k[kv_begin:kv_end],
            v=self.v[kv_begin:kv_end],
            cu_seqlens_qo=self.cu_seqlens_qo.new_tensor([0, end - begin]),
            cu_seqlens_kv=self.cu_seqlens_kv.new_tensor([0, kv_end - kv_begin]),
        )


def make_dense_prefill_inputs(
    lengths: Sequence[tuple[int, int]],
    *,
    h_q: int = 4,
    h_kv: int = 2,
    d_qk: int = 192,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    spare: int = 3,
    spread: float = 1.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> DensePrefillInputs:
    """Sequences of `(queries, keys)`, with `spare` tokens of NaN behind them.

    Args:
        lengths: of each sequence; 0 is a length.
        h_q, h_kv, d_qk, dtype, causal: of the call.
        spare: tokens behind the last sequence.
        spread: standard deviation of the scaled scores, roughly.
        device: where the tensors are.
        seed: of the random values.
    """
    generator = torch.Generator().manual_seed(seed)

    def rows(count: int, heads: int, width: int, factor: float = 1.0) -> Tensor:
        values = torch.full((count + spare, heads, width), float("nan"))
        values[:count] = factor * torch.randn((count, heads, width), generator=generator)
        return values.to(dtype).to(device)

    def running(counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    queries, keys = [s_q for s_q, _ in lengths], [s_kv for _, s_kv in lengths]
    return DensePrefillInputs(
        rows(sum(queries), h_q, d_qk, spread),
        rows(sum(keys), h_kv, d_qk),
        rows(sum(keys), h_kv, HEAD_DIM_V),
        running(queries),
        running(keys),
        max(queries, default=0),
        max(keys, default=0),
        causal,
    )


def expected_dense_prefill(inputs: DensePrefillInputs, compute_dtype: torch.dtype = torch.float64) -> Answer:
    """The right answer, and the emulation its tolerance comes from: float32, probabilities and out in q's dtype."""
    scale = inputs.softmax_scale
    arguments: dict[str, Any] = {
        "softmax_scale": default_softmax_scale(inputs.q.shape[-1]) if scale is None else scale,
        "causal": inputs.causal,
    }
    tensors = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)
    out, lse = reference_prefill.attend(*tensors, compute_dtype=compute_dtype, **arguments)
    emulated_out, emulated_lse = reference_prefill.attend(*tensors, probability_dtype=inputs.q.dtype, **arguments)
    return Answer(out, lse, emulated_out.to(inputs.q.dtype), emulated_lse)


def expected_dense_prefill_gradients(
    inputs: DensePrefillInputs,
    d_out: Tensor,
    d_lse: Tensor,
    compute_dtype: torch.dtype = torch.float64,
    probability_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for those of out `[tokens_q, h_q, 128]` and lse `[tokens_q, h_q]`.

    `probability_dtype`: with the roundings of a kernel, for the tolerance.
    """
    scale = inputs.softmax_scale
    tensors = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)
    return reference_prefill.attend_backward(
        d_out,
        d_lse,
        *tensors,
        softmax_scale=default_softmax_scale(inputs.q.shape[-1]) if scale is None else scale,
        causal=inputs.causal,
        compute_dtype=compute_dtype,
        probability_dtype=probability_dtype,
    )


def random_dense_prefill_gradients(inputs: DensePrefillInputs, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of out, in q's dtype, and of lse, NaN for the tokens behind the last sequence."""
    generator = torch.Generator().manual_seed(seed)
    tokens, h_q, _ = inputs.q.shape
    d_out = torch.randn((tokens, h_q, HEAD_DIM_V), generator=generator)
    d_lse = torch.randn((tokens, h_q), generator=generator)
    behind = int(inputs.cu_seqlens_qo[-1])
    d_out[behind:], d_lse[behind:] = float("nan"), float("nan")
    return d_out.to(inputs.q).contiguous(), d_lse.to(inputs.q.device)
