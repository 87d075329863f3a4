"""What is measured: ours and the peers, each behind the same small face.

A peer that takes several ways to do the same call offers them all as variants, and its fastest one counts.
"""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.inputs import Inputs, contiguous_inputs, paged_inputs
from benchmarks.prefill_inputs import PrefillBackwardInputs, PrefillInputs, prefill_backward_inputs, prefill_inputs
from benchmarks.shapes import (
    AnyShape,
    PrefillBackwardShape,
    PrefillShape,
    SparsePrefillBackwardShape,
    SparsePrefillShape,
    SparseShape,
)
from benchmarks.sparse_inputs import SparseInputs, sparse_inputs
from benchmarks.sparse_prefill_inputs import (
    SparsePrefillBackwardInputs,
    SparsePrefillInputs,
    sparse_prefill_backward_inputs,
    sparse_prefill_inputs,
)

AnyInputs = Inputs | SparseInputs | PrefillInputs | SparsePrefillInputs

# One call: out [b, s_q, h_q, d_v] and lse [b, h_q, s_q] (None where the implementation does not return it); of prefill
# [tokens, h_q, d_v] and [tokens, h_q], of its backward the gradients of q, k and v and None.
Call = Callable[[], tuple[Any, "torch.Tensor | None"]]


class NotServed(Exception):
    """The implementation does not take this shape; not a failure."""


@dataclass
class Variant:
    """One way to make the call, with one callable per input set."""

    name: str
    calls: list[Call]


class Implementation(ABC):
    """Imports its library when it is made, and builds its calls over inputs that it lays out itself."""

    @abstractmethod
    def about(self) -> dict[str, str]:
        """What goes into the record: version and the like."""

    @abstractmethod
    def inputs(self, shape: AnyShape, device: torch.device, sets: int) -> AnyInputs:
        """Inputs in the layout that this library wants. Raises NotServed."""

    @abstractmethod
    def variants(self, inputs: AnyInputs) -> list[Callable[[], Variant]]:
        """The ways to call, lazily and the safest first: one that raises is left out if another works."""


class Ours(Implementation):
    """This repository's flash_mla."""

    def __init__(self) -> None:
        import flash_mla

        self._module: Any = flash_mla
        if not hasattr(flash_mla, "why_not"):
            raise ImportError("the flash_mla that Python finds is not this repository's")

    def about(self) -> dict[str, str]:
        about = {"version": str(self._module.__version__)}
        try:
            lines = str(torch.ops.flash_mla.build_info()).splitlines()
        except (AttributeError, RuntimeError):
            return {**about, "library": "none"}
        about.update(line.split("=", 1) for line in lines if "=" in line)
        return about

    def inputs(self, shape: AnyShape, device: torch.device, sets: int) -> AnyInputs:
        if isinstance(shape, SparseShape):
            return sparse_inputs(shape, device, sets)
        if isinstance(shape, PrefillBackwardShape):
            return prefill_backward_inputs(shape, device, sets)
        if isinstance(shape, PrefillShape):
            return prefill_inputs(shape, device, sets)
        if isinstance(shape, SparsePrefillBackwardShape):
            return sparse_prefill_backward_inputs(shape, device, sets)
        if isinstance(shape, SparsePrefillShape):
            return sparse_prefill_inputs(shape, device, sets)
        return paged_inputs(shape, device, sets)

    def variants(self, inputs: AnyInputs) -> list[Callable[[], Variant]]:
        if isinstance(inputs, SparseInputs):
            return [lambda: Variant("default", self._sparse_calls(inputs))]
        if isinstance(inputs, PrefillBackwardInputs):
            return [lambda: Variant("default", self._prefill_backward_calls(inputs))]
        if isinstance(inputs, PrefillInputs):
            return [lambda: Variant("default", self._prefill_calls(inputs))]
        if isinstance(inputs, SparsePrefillBackwardInputs):
            return [lambda: Variant("default", self._sparse_prefill_backward_calls(inputs))]
        if isinstance(inputs, SparsePrefillInputs):
            return [lambda: Variant("default", self._sparse_prefill_calls(inputs))]
        return [lambda: Variant("default", self._calls(inputs))]

    def _calls(self, inputs: Inputs) -> list[Call]:
        decode = self._module.flash_mla_with_kvcache
        schedule, _ = self._module.get_mla_metadata()
        shape, table = inputs.shape, inputs.block_table
        assert table is not None
        self._require_kernel("dense_decode", q=inputs.q[0], k_cache=inputs.k_cache, head_dim_v=shape.d_v)

        def call(index: int) -> Call:
            q, pages = inputs.q[index], table[index]
            return lambda: decode(
                q, inputs.k_cache, pages, inputs.cache_seqlens, shape.d_v, schedule, causal=shape.causal
            )

        return [call(index) for index in range(inputs.sets)]

    def _sparse_calls(self, inputs: SparseInputs) -> list[Call]:
        decode = self._module.flash_mla_with_kvcache
        schedule, _ = self._module.get_mla_metadata()
        self._require_kernel("sparse_decode", **inputs.arguments(0))

        def call(index: int) -> Call:
            arguments = inputs.arguments(index)
            return lambda: decode(tile_scheduler_metadata=schedule, **arguments)

        return [call(index) for index in range(inputs.sets)]

    def _prefill_calls(self, inputs: PrefillInputs) -> list[Call]:
        attend = self._module.flash_attn_varlen_func
        longest, running = max(inputs.lengths), inputs.cu_seqlens
        first = {"q": inputs.q[0], "k": inputs.k[0], "v": inputs.v[0], "cu_seqlens_qo": running}
        self._require_kernel("dense_prefill", **first)

        def call(index: int) -> Call:
            q, k, v = inputs.q[index], inputs.k[index], inputs.v[index]
            return lambda: attend(q, k, v, running, running, longest, longest, causal=inputs.shape.causal)

        return [call(index) for index in range(inputs.sets)]

    def _prefill_backward_calls(self, inputs: PrefillBackwardInputs) -> list[Call]:
        """The operator that autograd calls."""
        attend, differentiate = torch.ops.flash_mla.dense_prefill, torch.ops.flash_mla.dense_prefill_backward
        longest, running, shape = max(inputs.lengths), inputs.cu_seqlens, inputs.shape
        assert isinstance(shape, PrefillBackwardShape)
        first = {"q": inputs.q[0], "k": inputs.k[0], "v": inputs.v[0], "cu_seqlens_qo": running}
        self._require_kernel("dense_prefill_backward", **first)
        options = (running, running, longest, longest, shape.d_qk**-0.5, shape.causal, shape.deterministic)

        def call(index: int) -> Call:
            tensors = (inputs.q[index], inputs.k[index], inputs.v[index])
            out, lse = attend(*tensors, *options)
            d_out, d_lse = inputs.d_out[index], torch.zeros_like(lse)
            return lambda: (differentiate(d_out, d_lse, *tensors, out, lse, *options), None)

        return [call(index) for index in range(inputs.sets)]

    def _sparse_prefill_calls(self, inputs: SparsePrefillInputs) -> list[Call]:
        attend, shape = self._module.flash_mla_sparse_fwd, inputs.shape
        copies = shape.source.endswith("copied")
        self._require_kernel("sparse_prefill", q=inputs.q[0], kv=inputs.kv, indices=inputs.indices[0])

        def call(index: int) -> Call:
            def run() -> tuple[torch.Tensor, torch.Tensor]:
                kv = self._module.dequantize_kv_cache(inputs.kv, "V32") if copies else inputs.kv
                q, indices = inputs.q[index], inputs.indices[index]
                out, _, lse = attend(q, kv, indices, shape.d_qk**-0.5, shape.d_v, inputs.sink)
                return out, lse

            return run

        return [call(index) for index in range(inputs.sets)]

    def _sparse_prefill_backward_calls(self, inputs: SparsePrefillBackwardInputs) -> list[Call]:
        """The operator that autograd calls."""
        attend, differentiate = torch.ops.flash_mla.sparse_prefill, torch.ops.flash_mla.sparse_prefill_backward
        shape = inputs.shape
        assert isinstance(shape, SparsePrefillBackwardShape)
        self._require_kernel("sparse_prefill_backward", q=inputs.q[0], kv=inputs.kv, indices=inputs.indices[0])
        options = (shape.d_qk**-0.5, "e", shape.deterministic)

        def call(index: int) -> Call:
            rows = (inputs.kv[:, None], inputs.indices[index], None, None, None, None, inputs.sink, "BF16", None)
            q, d_out = inputs.q[index], inputs.d_out[index]
            out, _, lse = attend(q, *rows, shape.d_v, *options)
            d_lse = torch.zeros_like(lse)
            return lambda: (differentiate(d_out, d_lse, q, *rows, *options, out, lse), None)

        return [call(index) for index in range(inputs.sets)]

    def _require_kernel(self, op: str, **call: Any) -> None:
        """Raises NotServed where another backend would serve a call on a GPU: right, but not what is to be timed."""
        if not call["q"].is_cuda:
            return
        backends = self._module.backends
        with backends.use("cuda" if backends.override is None else backends.override.name):
            reason = self._module.why_not(op, **call)
        if reason is not None:
            raise NotServed(reason)


class FlashMLA(Implementation):
    """The wheel sgl-flash-mla (module flash_mla)."""

    def __init__(self) -> None:
        import flash_mla

        if hasattr(flash_mla, "why_not"):
            raise ImportError("the flash_mla that Python finds is this repository's, not the peer's")
        self._module: Any = flash_mla

    def about(self) -> dict[str, str]:
        return {"version": _distribution_version("sgl-flash-mla", self._module)}

    def inputs(self, shape: AnyShape, device: torch.device, sets: int) -> AnyInputs:
        if isinstance(shape, SparseShape):
            return sparse_inputs(shape, device, sets)
        if isinstance(shape, PrefillShape):
            raise NotServed("has dense prefill for Blackwell only")
        if isinstance(shape, SparsePrefillShape):
            if isinstance(shape, SparsePrefillBackwardShape):
                raise NotServed("has no gradients of sparse prefill")
            if shape.source != "BF16":
                raise NotServed("takes bf16 rows only")
            return sparse_prefill_inputs(shape, device, sets)
        if shape.page != 64:
            raise NotServed("takes pages of 64 tokens only")
        return paged_inputs(shape, device, sets)

    def variants(self, inputs: AnyInputs) -> list[Callable[[], Variant]]:
        if isinstance(inputs, SparseInputs):
            return self._sparse_variants(inputs)
        if isinstance(inputs, SparsePrefillInputs):
            return [lambda: Variant("use_legacy", self._sparse_prefill_calls(inputs))]
        assert isinstance(inputs, Inputs)
        return [lambda: Variant("use_legacy", self._calls(inputs))]

    def _calls(self, inputs: Inputs) -> list[Call]:
        plan, decode = self._module.get_mla_metadata, self._module.flash_mla_with_kvcache
        shape, table = inputs.shape, inputs.block_table
        assert table is not None
        plan_options, options = (_accepted(function, {"use_legacy": True}) for function in (plan, decode))
        heads_per_key = shape.s_q * shape.h_q // shape.h_kv
        schedule, splits = plan(inputs.cache_seqlens, heads_per_key, shape.h_kv, **plan_options)

        def call(index: int) -> Call:
            q, pages = inputs.q[index], table[index]
            return lambda: decode(
                q,
                inputs.k_cache,
                pages,
                inputs.cache_seqlens,
                shape.d_v,
                schedule,
                splits,
                causal=shape.causal,
                **options,
            )

        return [call(index) for index in range(inputs.sets)]

    def _sparse_variants(self, inputs: SparseInputs) -> list[Callable[[], Variant]]:
        heads = inputs.shape.h_q
        padded = next((known for known in _SPARSE_HEADS if heads <= known), heads)
        makers = [lambda: Variant("use_legacy", _tried(lambda: self._sparse_calls(inputs, heads)))]
        if padded != heads:
            # What an engine does where a kernel takes these numbers of heads only; the padding itself is not timed.
            # It comes first, since it is sure not to break the process.
            name = f"use_legacy, padded to {padded} heads"
            makers.insert(0, lambda: Variant(name, _tried(lambda: self._sparse_calls(inputs, padded))))
        return makers

    def _sparse_prefill_calls(self, inputs: SparsePrefillInputs) -> list[Call]:
        attend, shape = self._module.flash_mla_sparse_fwd, inputs.shape
        options = _accepted(attend, {"use_legacy": True})
        padded = next((known for known in _SPARSE_HEADS if shape.h_q <= known), shape.h_q)
        more, sink = padded - shape.h_q, inputs.sink
        q = torch.nn.functional.pad(inputs.q, (0, 0, 0, more)) if more else inputs.q
        if sink is not None and more:
            sink = torch.nn.functional.pad(sink, (0, more), value=float("-inf"))

        def call(index: int) -> Call:
            def run() -> tuple[torch.Tensor, None]:
                out = attend(
                    q[index],
                    inputs.kv,
                    inputs.indices[index],
                    shape.d_qk**-0.5,
                    shape.d_v,
                    attn_sink=sink,
                    **options,
                )[0]
                return out[:, : shape.h_q], None

            return run

        return [call(index) for index in range(inputs.sets)]

    def _sparse_calls(self, inputs: SparseInputs, heads: int) -> list[Call]:
        plan, decode = self._module.get_mla_metadata, self._module.flash_mla_with_kvcache
        shape, more = inputs.shape, heads - inputs.shape.h_q
        if more > 0:
            sink = inputs.sink
            sink = None if sink is None else torch.nn.functional.pad(sink, (0, more), value=float("-inf"))
            q = torch.nn.functional.pad(inputs.q, (0, 0, 0, more))
            inputs = dataclasses.replace(inputs, q=q, sink=sink)
        old_style = {"num_heads_q": heads, "is_fp8_kvcache": True, "topk": shape.topk, "use_legacy": True}
        seqlens = torch.full((shape.b,), shape.context, dtype=torch.int32, device=inputs.q.device)
        schedule, splits = plan(seqlens, shape.s_q * heads, 1, **_accepted(plan, old_style))
        options = _accepted(decode, {"use_legacy": True})

        def call(index: int) -> Call:
            arguments = {**inputs.arguments(index), **options}

            def run() -> tuple[torch.Tensor, torch.Tensor]:
                out, lse = decode(tile_scheduler_metadata=schedule, num_splits=splits, **arguments)[:2]
                return (out, lse) if more == 0 else (out[:, :, : shape.h_q], lse[:, : shape.h_q])

            return run

        return [call(index) for index in range(inputs.sets)]


class FlashAttention3(Implementation):
    """The wheel fa3-fwd (module fa3_fwd_interface): the absorbed form over a contiguous cache, with its schedule."""

    def __init__(self) -> None:
        import fa3_fwd_interface

        self._module: Any = fa3_fwd_interface

    def about(self) -> dict[str, str]:
        return {"version": _distribution_version("fa3-fwd", self._module)}

    def inputs(self, shape: AnyShape, device: torch.device, sets: int) -> AnyInputs:
        if isinstance(shape, (SparseShape, SparsePrefillShape)):
            raise NotServed("reads no indices and no such cache formats")
        if isinstance(shape, PrefillBackwardShape):
            raise NotServed("the wheel has no backward")
        if isinstance(shape, PrefillShape):
            return prefill_inputs(shape, device, sets)
        if shape.d_qk == shape.d_v:
            raise NotServed("wants the RoPE dims as its query and key")
        return contiguous_inputs(shape, device, sets)

    def variants(self, inputs: AnyInputs) -> list[Callable[[], Variant]]:
        if isinstance(inputs, PrefillInputs):
            return [lambda: Variant("default", self._prefill_calls(inputs))]
        assert isinstance(inputs, Inputs)
        # Parts of their own, contiguous: the peer's best case.
        rope = inputs.k_cache[..., inputs.shape.d_v :].contiguous()
        values = inputs.k_cache[..., : inputs.shape.d_v].contiguous()
        q_rope = inputs.q[..., inputs.shape.d_v :].contiguous()
        q_nope = inputs.q[..., : inputs.shape.d_v].contiguous()
        parts = (q_rope, q_nope, rope, values)
        return [
            lambda: Variant("splits by heuristic", self._calls(inputs, parts, 0, False)),
            lambda: Variant("splits by heuristic, schedule reused", self._calls(inputs, parts, 0, True)),
            lambda: Variant("one split", self._calls(inputs, parts, 1, False)),
        ]

    def _prefill_calls(self, inputs: PrefillInputs) -> list[Call]:
        attend = self._module.flash_attn_varlen_func
        longest, running = max(inputs.lengths), inputs.cu_seqlens

        def call(index: int) -> Call:
            q, k, v = inputs.q[index], inputs.k[index], inputs.v[index]

            def run() -> tuple[torch.Tensor, torch.Tensor | None]:
                out = attend(
                    q,
                    k,
                    v,
                    cu_seqlens_q=running,
                    cu_seqlens_k=running,
                    max_seqlen_q=longest,
                    max_seqlen_k=longest,
                    causal=inputs.shape.causal,
                )
                return (out[0] if isinstance(out, tuple) else out), None

            return run

        return [call(index) for index in range(inputs.sets)]

    def _calls(self, inputs: Inputs, parts: tuple[torch.Tensor, ...], num_splits: int, planned: bool) -> list[Call]:
        decode = self._module.flash_attn_with_kvcache
        shape = inputs.shape
        q_rope, q_nope, rope, values = parts
        options: dict[str, Any] = {"num_splits": num_splits}
        if planned:
            options["scheduler_metadata"] = self._schedule(inputs, num_splits)
        options = _accepted(decode, options)

        def call(index: int) -> Call:
            q, qv, k, v = q_rope[index], q_nope[index], rope[index], values[index]

            def run() -> tuple[torch.Tensor, torch.Tensor | None]:
                out = decode(
                    q,
                    k,
                    v,
                    qv=qv,
                    cache_seqlens=inputs.cache_seqlens,
                    softmax_scale=shape.d_qk**-0.5,
                    causal=shape.causal,
                    **options,
                )
                return (out[0] if isinstance(out, tuple) else out), None

            return run

        return [call(index) for index in range(inputs.sets)]

    def _schedule(self, inputs: Inputs, num_splits: int) -> Any:
        plan = getattr(self._module, "get_scheduler_metadata", None)
        if plan is None:
            raise NotServed("no get_scheduler_metadata")
        shape = inputs.shape
        options = _accepted(
            plan,
            {
                "batch_size": shape.b,
                "max_seqlen_q": shape.s_q,
                "max_seqlen_k": inputs.k_cache.shape[2],
                "num_heads_q": shape.h_q,
                "num_heads": shape.h_q,
                "num_heads_kv": shape.h_kv,
                "num_heads_k": shape.h_kv,
                "headdim": shape.d_qk - shape.d_v,
                "headdim_v": shape.d_v,
                "cache_seqlens": inputs.cache_seqlens,
                "qkv_dtype": inputs.q.dtype,
                "causal": shape.causal,
                "has_qv": True,
                "num_splits": num_splits,
            },
        )
        return plan(**options)


IMPLEMENTATIONS: dict[str, type[Implementation]] = {
    "ours": Ours,
    "flashmla": FlashMLA,
    "fa3": FlashAttention3,
}
PEERS = ("flashmla", "fa3")
_SPARSE_HEADS = (64, 128)


def _tried(make: Callable[[], list[Call]]) -> list[Call]:
    """The calls that `make` makes. Raises NotServed where they cannot be made, or the first one declines."""
    try:
        calls = make()
        calls[0]()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise NotServed(f"{type(error).__name__}: {lines[0]}") from error
    return calls


def _accepted(function: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that `function` takes by keyword."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return options
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return options
    return {name: value for name, value in options.items() if name in parameters}


def _distribution_version(distribution: str, module: Any) -> str:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return str(getattr(module, "__version__", "unknown"))
