"""Inputs of sparse attention, decode and prefill, with traps: slots that no valid index names are NaN, and lanes past a
length name just those.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flash_mla.backends import reference_sparse
from flash_mla.backends.reference_kv_cache import append_kv_cache
from flash_mla.backends.reference_sparse import Attention, Selection
from flash_mla.kv_format import KVFormat
from flash_mla.problem import HEAD_DIM_V, default_softmax_scale
from flash_mla.testing.inputs import Answer

POISON = 0xFF
"""In every byte: NaN as e4m3, bfloat16 and float32, and the largest ue8m0 scale."""


def poisoned_cache(
    kv_format: KVFormat | str,
    num_blocks: int,
    page: int,
    d_qk: int = 576,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    """A cache of NaN, padding included, with the strides that engines use.

    Args:
        kv_format: of the cache.
        num_blocks, page: its size.
        d_qk: values of a row, for BF16.
        device: where it is.
        dtype: what the cache of a byte format is declared as.
    """
    known = KVFormat(kv_format)
    if known is KVFormat.BF16:
        return torch.full((num_blocks, page, 1, d_qk), float("nan"), dtype=torch.bfloat16, device=device)
    size, stride = known.layout.bytes_per_token, known.layout.page_stride(page)
    pages = torch.full((num_blocks * stride,), POISON, dtype=torch.uint8, device=device)
    return pages.as_strided((num_blocks, page, 1, size), (stride, size, size, 1)).view(dtype)


@dataclass
class Selected:
    """A cache, the indices into it, and how many of them count."""

    cache: Tensor
    indices: Tensor
    """int32 `[b, s_q, topk]`."""
    lengths: Tensor | None
    """int32 `[b]` or `[b, s_q]`."""
    kv_format: KVFormat

    def selection(self) -> Selection:
        """What the reference takes."""
        return Selection.of(self.cache, self.kv_format.value, self.indices, self.lengths)

    def rows(self, requests: slice) -> "Selected":
        """What some of the requests select from the same cache."""
        lengths = None if self.lengths is None else self.lengths[requests].contiguous()
        return Selected(self.cache, self.indices[requests], lengths, self.kv_format)

    def to(self, device: torch.device | str) -> "Selected":
        """The same on another device; the cache keeps its strides, which `Tensor.to` may not."""

        def moved(tensor: Tensor) -> Tensor:
            there = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
            return there.copy_(tensor.detach())

        lengths = None if self.lengths is None else moved(self.lengths)
        return Selected(moved(self.cache), moved(self.indices), lengths, self.kv_format)


@dataclass
class SparseDecodeInputs:
    """The tensors of one sparse decode call."""

    q: Tensor
    primary: Selected
    extra: Selected | None = None
    attn_sink: Tensor | None = None
    softmax_scale: float | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments for `flash_mla_with_kvcache`, without the schedule."""
        extra = self.extra
        return {
            "q": self.q,
            "k_cache": self.primary.cache,
            "block_table": None,
            "cache_seqlens": None,
            "head_dim_v": HEAD_DIM_V,
            "softmax_scale": self.softmax_scale,
            "is_fp8_kvcache": self.primary.kv_format is not KVFormat.BF16,
            "indices": self.primary.indices,
            "topk_length": self.primary.lengths,
            "attn_sink": self.attn_sink,
            "extra_k_cache": None if extra is None else extra.cache,
            "extra_indices_in_kvcache": None if extra is None else extra.indices,
            "extra_topk_length": None if extra is None else extra.lengths,
            "kv_format": self.primary.kv_format,
        }

    def rows(self, requests: slice) -> "SparseDecodeInputs":
        """The same call for some of the requests, over the same caches."""
        extra = None if self.extra is None else self.extra.rows(requests)
        return SparseDecodeInputs(
            self.q[requests], self.primary.rows(requests), extra, self.attn_sink, self.softmax_scale
        )


@dataclass
class SparsePrefillInputs:
    """The tensors of one sparse prefill call."""

    q: Tensor
    primary: Selected
    """Its indices are `[s_q, 1, topk]`, its lengths `[s_q]`."""
    sm_scale: float
    d_v: int = HEAD_DIM_V
    extra: Selected | None = None
    attn_sink: Tensor | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments for `flash_mla_sparse_fwd`."""
        extra = self.extra
        return {
            "q": self.q,
            "kv": self.primary.cache,
            "indices": self.primary.indices,
            "sm_scale": self.sm_scale,
            "d_v": self.d_v,
            "attn_sink": self.attn_sink,
            "topk_length": self.primary.lengths,
            "kv_format": self.primary.kv_format,
            "extra_k_cache": None if extra is None else extra.cache,
            "extra_indices_in_kvcache": None if extra is None else extra.indices,
            "extra_topk_length": None if extra is None else extra.lengths,
        }

    def rows(self, queries: slice) -> "SparsePrefillInputs":
        """The same call for some of the queries, over the same rows."""
        extra = None if self.extra is None else self.extra.rows(queries)
        primary = self.primary.rows(queries)
        return SparsePrefillInputs(self.q[queries], primary, self.sm_scale, self.d_v, extra, self.attn_sink)


def make_selected(
    tokens: tuple[int, int],
    topk: int,
    *,
    kv_format: KVFormat | str = KVFormat.V32,
    d_qk: int = 576,
    page: int = 64,
    num_blocks: int = 5,
    lengths: Literal["none", "request", "token"] | list[int] = "none",
    invalid: float = 0.1,
    octaves: int = 0,
    magnitude: int = 0,
    dtype: torch.dtype = torch.uint8,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Selected:
    """Random indices into a new cache whose other slots are NaN.

    Args:
        tokens: `(b, s_q)`.
        topk: lanes of the indices.
        kv_format, page, num_blocks, d_qk, dtype: of the cache; see `poisoned_cache`.
        lengths: None, a random number for each request or token (0 included), or these numbers, one per request.
        invalid: share of the lanes that hold -1, huge or negative garbage.
        octaves: rows are multiplied by powers of two from 2^-octaves to 2^octaves, and so are their columns, 32 by 32.
        magnitude: rows are multiplied by 2^magnitude.
        device: where the tensors are.
        seed: of the random values.
    """
    known = KVFormat(kv_format)
    generator = torch.Generator().manual_seed(seed)
    slots = num_blocks * page
    indices = torch.randint(0, slots, (*tokens, topk), generator=generator)
    garbage = torch.tensor([-1, -1, slots, slots + 7, 2**31 - 1, -(2**31), -slots])
    spoiled = garbage[torch.randint(0, len(garbage), indices.shape, generator=generator)]
    indices = torch.where(torch.rand(indices.shape, generator=generator) < invalid, spoiled, indices)
    counts = _lengths(tokens, topk, lengths, generator)
    counted = torch.full(tokens, topk) if counts is None else (counts if counts.dim() == 2 else counts[:, None])
    live = (torch.arange(topk) < counted[..., None]) & (indices >= 0) & (indices < slots)
    reached = torch.unique(indices[live])
    cache = poisoned_cache(known, num_blocks, page, d_qk, device, dtype)
    rows = torch.randn((len(reached), known.d_qk_of(cache)), generator=generator)
    if octaves > 0:
        sizes = [
            torch.randint(-octaves, octaves + 1, (len(rows), n), generator=generator) for n in (1, rows.shape[1] // 32)
        ]
        rows *= torch.exp2((sizes[0] + sizes[1]).float()).repeat_interleave(32, dim=1)
    rows = (rows * 2.0**magnitude).to(torch.bfloat16).to(device)
    append_kv_cache(rows, cache, reached.to(device), known.value, False)
    on_device = None if counts is None else counts.to(torch.int32).to(device)
    return Selected(cache, indices.to(torch.int32).to(device), on_device, known)


def _lengths(
    tokens: tuple[int, int],
    topk: int,
    kind: Literal["none", "request", "token"] | list[int],
    generator: torch.Generator,
) -> Tensor | None:
    if isinstance(kind, list):
        return torch.tensor(kind)
    if kind == "none":
        return None
    counts = torch.randint(0, topk + 1, tokens, generator=generator)
    counts.view(-1)[-1:] = 0
    return counts if kind == "token" else counts[:, 0]


def make_sparse_decode_inputs(
    b: int = 2,
    s_q: int = 1,
    *,
    h_q: int = 16,
    topk: int = 70,
    extra_topk: int = 0,
    extra_page: int = 2,
    extra_format: KVFormat | str | None = None,
    extra_lengths: Literal["none", "request", "token"] | list[int] = "none",
    sink: bool = False,
    spread: float = 1.0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    **options: Any,
) -> SparseDecodeInputs:
    """A sparse decode call.

    Args:
        b, s_q, h_q: of q.
        topk: lanes of the indices.
        extra_topk: lanes of the indices into a second cache; 0 for none.
        extra_page, extra_format, extra_lengths: of the second cache; by default of the same format.
        sink: add an attention sink.
        spread: standard deviation of the scaled scores, roughly.
        seed: of the random values.
        device: where the tensors are.
        **options: of `make_selected`.
    """
    primary = make_selected((b, s_q), topk, seed=seed, device=device, **options)
    extra = None
    if extra_topk > 0:
        known = primary.kv_format if extra_format is None else KVFormat(extra_format)
        blocks = max(2, 100 // extra_page)
        changed = {"kv_format": known, "page": extra_page, "num_blocks": blocks, "lengths": extra_lengths}
        extra = make_selected((b, s_q), extra_topk, seed=seed + 1, device=device, **{**options, **changed})
    generator = torch.Generator().manual_seed(seed + 2)
    d_qk = primary.kv_format.d_qk_of(primary.cache)
    q = (spread * torch.randn((b, s_q, h_q, d_qk), generator=generator)).to(torch.bfloat16).to(device)
    attn_sink = (2 * torch.randn(h_q, generator=generator)).to(device) if sink else None
    return SparseDecodeInputs(q, primary, extra, attn_sink)


def make_sparse_prefill_inputs(
    s_q: int = 5, *, d_v: int = HEAD_DIM_V, rows: bool = True, **options: Any
) -> SparsePrefillInputs:
    """A sparse prefill call.

    Args:
        s_q: queries.
        d_v: values of a row that are V.
        rows: give bfloat16 caches as `[s_kv, 1, d_qk]`, not in pages.
        **options: of `make_sparse_decode_inputs`; lengths by token become `[s_q]`.
    """
    inputs = make_sparse_decode_inputs(s_q, 1, **{"kv_format": KVFormat.BF16, **options})
    for side in (inputs.primary, inputs.extra):
        if side is not None:
            if side.lengths is not None:
                side.lengths = side.lengths.reshape(s_q)
            if rows and side.kv_format is KVFormat.BF16:
                side.cache = side.cache.flatten(0, 1)
    scale = default_softmax_scale(inputs.q.shape[-1])
    return SparsePrefillInputs(inputs.q[:, 0], inputs.primary, scale, d_v, inputs.extra, inputs.attn_sink)


def _attend(
    q: Tensor, inputs: SparseDecodeInputs | SparsePrefillInputs, scale: float, d_v: int, **options: Any
) -> Attention:
    sides = [side.selection() for side in (inputs.primary, inputs.extra) if side is not None]
    return reference_sparse.attend(q, sides, softmax_scale=scale, attn_sink=inputs.attn_sink, d_v=d_v, **options)


def expected_sparse_decode(inputs: SparseDecodeInputs, compute_dtype: torch.dtype = torch.float64) -> Answer:
    """The right answer, and the emulation that its tolerance comes from: float32, probabilities and out in bfloat16."""
    b, s_q, h_q, d_qk = inputs.q.shape
    scale = default_softmax_scale(d_qk) if inputs.softmax_scale is None else inputs.softmax_scale
    q = inputs.q.flatten(0, 1)
    truth = _attend(q, inputs, scale, HEAD_DIM_V, compute_dtype=compute_dtype)
    emulated = _attend(q, inputs, scale, HEAD_DIM_V, probability_dtype=inputs.q.dtype)

    def lse(result: Attention) -> Tensor:
        return result.lse.view(b, s_q, h_q).transpose(1, 2)

    shape = (b, s_q, h_q, HEAD_DIM_V)
    emulated_out = emulated.out.to(inputs.q.dtype).view(shape)
    return Answer(truth.out.view(shape), lse(truth), emulated_out, lse(emulated))


@dataclass(frozen=True)
class PrefillAnswer(Answer):
    """`Answer` of a prefill call, `[s_q, h_q, d_v]` and `[s_q, h_q]`, with the largest scores."""

    max_logits: Tensor
    emulated_max_logits: Tensor


def expected_sparse_prefill(inputs: SparsePrefillInputs, compute_dtype: torch.dtype = torch.float64) -> PrefillAnswer:
    """The right answer of `flash_mla_sparse_fwd`, lse in natural log, and its emulation."""
    truth = _attend(inputs.q, inputs, inputs.sm_scale, inputs.d_v, compute_dtype=compute_dtype)
    emulated = _attend(inputs.q, inputs, inputs.sm_scale, inputs.d_v, probability_dtype=inputs.q.dtype)
    emulated_out = emulated.out.to(inputs.q.dtype)
    return PrefillAnswer(truth.out, truth.lse, emulated_out, emulated.lse, truth.max_logits, emulated.max_logits)


def random_sparse_prefill_gradients(inputs: SparsePrefillInputs, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of out, in q's dtype, and of lse, NaN for the queries that select nothing."""
    generator = torch.Generator().manual_seed(seed)
    shape = inputs.q.shape[:2]
    d_out = torch.randn((*shape, inputs.d_v), generator=generator).to(inputs.q)
    d_lse = torch.randn(shape, generator=generator).to(inputs.q.device)
    nothing = _attend(inputs.q, inputs, inputs.sm_scale, inputs.d_v).lse == float("inf")
    return d_out.masked_fill(nothing[..., None], float("nan")), d_lse.masked_fill(nothing, float("nan"))


def expected_sparse_prefill_gradients(
    inputs: SparsePrefillInputs,
    d_out: Tensor,
    d_lse: Tensor,
    compute_dtype: torch.dtype = torch.float64,
    probability_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Gradients of q, of bfloat16 caches and of the sink, as far as there are any, for those of out `[s_q, h_q, d_v]`
    and lse `[s_q, h_q]`, of base e.

    `probability_dtype`: with the roundings of a kernel, for the tolerance.
    """
    gradients = reference_sparse.attend_backward(
        d_out,
        d_lse,
        inputs.q,
        [side.selection() for side in (inputs.primary, inputs.extra) if side is not None],
        softmax_scale=inputs.sm_scale,
        attn_sink=inputs.attn_sink,
        compute_dtype=compute_dtype,
        probability_dtype=probability_dtype,
    )
    names = ("q", "kv", "extra_k_cache", "attn_sink")
    kv, extra = (*gradients.caches, None)[:2]
    known = dict(zip(names, (gradients.q, kv, extra, gradients.attn_sink), strict=True))
    shapes = {"kv": inputs.primary.cache.shape}
    if inputs.extra is not None:
        shapes["extra_k_cache"] = inputs.extra.cache.shape
    return {name: each.view(shapes.get(name, each.shape)) for name, each in known.items() if each is not None}
