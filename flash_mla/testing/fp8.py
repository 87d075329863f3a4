"""Inputs of dense decode over FP8 caches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla.backends import reference
from flash_mla.backends.reference_kv_cache import append_kv_cache
from flash_mla.kv_format import KVFormat
from flash_mla.problem import FP8, default_softmax_scale
from flash_mla.testing.inputs import Answer, DenseDecodeInputs, make_dense_decode_inputs
from flash_mla.testing.sparse import poisoned_cache


@dataclass
class DenseFP8Inputs(DenseDecodeInputs):
    """The tensors of one dense decode call over an FP8 cache."""

    kv_format: KVFormat | None = None
    """None: e4m3 values times descale_k."""
    descale_q: Tensor | None = None
    descale_k: Tensor | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments for `flash_mla_with_kvcache`, without the schedule."""
        return {
            **super().call(),
            "is_fp8_kvcache": True,
            "kv_format": self.kv_format,
            "descale_q": self.descale_q,
            "descale_k": self.descale_k,
        }


def make_dense_fp8_inputs(
    lengths: list[int], kv_format: KVFormat | str | None, *, fp8_q: bool = False, **options: Any
) -> DenseFP8Inputs:
    """`make_dense_decode_inputs` with its cache in an FP8 format; NaN in every slot that no length reaches.

    Args:
        lengths: keys of each request.
        kv_format: of the cache; None for e4m3 values with one scale.
        fp8_q: give q as e4m3 too.
        **options: of `make_dense_decode_inputs`.
    """
    known = None if kv_format is None else KVFormat(kv_format)
    if known is not None:
        options["d_qk"] = known.layout.d_qk
    plain = make_dense_decode_inputs(lengths, **options)
    fields = {name: getattr(plain, name) for name in ("block_table", "cache_seqlens", "causal", "attn_sink")}
    values, device = plain.k_cache, plain.q.device
    if known is None:
        descale_k = torch.tensor([0.0123], device=device)
        cache = (values.float() / descale_k).to(FP8)
    else:
        descale_k = None
        num_blocks, page, _, d_qk = values.shape
        cache = poisoned_cache(known, num_blocks, page, device=device)
        rows = values.reshape(num_blocks * page, d_qk)
        slots = (~rows[:, 0].isnan()).nonzero()[:, 0]
        append_kv_cache(rows[slots], cache, slots, known.value, False)
    q, descale_q = plain.q, None
    if fp8_q:
        descale_q = torch.tensor(0.25, device=device)
        q = (q.float() / descale_q).to(FP8)
    return DenseFP8Inputs(q, cache, **fields, kv_format=known, descale_q=descale_q, descale_k=descale_k)


def expected_dense_fp8(inputs: DenseFP8Inputs, compute_dtype: torch.dtype = torch.float64) -> Answer:
    """The right answer, and the emulation that its tolerance comes from: float32, probabilities and out in bfloat16."""
    scale = inputs.softmax_scale
    q = inputs.q if inputs.descale_q is None else inputs.q.float() * inputs.descale_q
    arguments: dict[str, Any] = {
        "softmax_scale": default_softmax_scale(q.shape[-1]) if scale is None else scale,
        "causal": inputs.causal,
        "attn_sink": inputs.attn_sink,
        "kv_format": inputs.kv_format,
        "descale_k": inputs.descale_k,
    }
    tensors = (q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens)
    out, lse = reference.attend(*tensors, compute_dtype=compute_dtype, **arguments)
    emulated_out, emulated_lse = reference.attend(*tensors, probability_dtype=torch.bfloat16, **arguments)
    return Answer(out, lse, emulated_out.to(torch.bfloat16), emulated_lse)
