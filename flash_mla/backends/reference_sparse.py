"""Sparse attention in PyTorch: every token attends to the cache rows that its indices name.

`attend` is the definition. It reads rows in blocks of indices, for some tokens at a time, so memory stays bounded
whatever the lengths. It masks by selecting: a row that no valid index names is never part of a result, and an index
that is not valid is never used as one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flash_mla import problem_sparse
from flash_mla.backends.reference_kv_cache import gather_rows
from flash_mla.backends.reference_schedule import blocks_of, plan_blocks
from flash_mla.backends.reference_softmax import OnlineSoftmax
from flash_mla.kv_format import KVFormat

KEYS_PER_STEP = 512
SCRATCH_ELEMENTS = 1 << 25
"""Tokens are taken together as long as their rows, scores and accumulators stay within this many numbers."""

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Selection:
    """A cache, and the rows of it that each token selects."""

    cache: Tensor
    """`[num_blocks, page, 1, d_qk or bytes]`."""
    kv_format: KVFormat
    indices: Tensor
    """int32 `[tokens, topk]`, each `page_index * page + offset`; anything else selects nothing."""
    lengths: Tensor
    """int64 `[tokens]`: how many leading indices count."""

    @staticmethod
    def of(cache: Tensor, kv_format: str, indices: Tensor, lengths: Tensor | None) -> "Selection":
        """From an operator's arguments: indices `[.., .., topk]`, lengths `[b]`, `[b, s_q]` or None for all."""
        topk = indices.shape[-1]
        cache = problem_sparse.as_cache(cache)
        return Selection(cache, KVFormat(kv_format), indices.flatten(0, 1), token_lengths(lengths, indices, topk))

    @property
    def slots(self) -> int:
        """Rows of the cache."""
        return self.cache.shape[0] * self.cache.shape[1]

    def of_tokens(self, tokens: slice) -> "Selection":
        """The same for some of the tokens."""
        return replace(self, indices=self.indices[tokens], lengths=self.lengths[tokens])

    def compacted(self) -> "Selection":
        """For one token: its valid indices alone, so that nothing depends on the others."""
        indices = self.indices[:, : int(self.lengths[0])]
        indices = indices[(indices >= 0) & (indices < self.slots)][None]
        return replace(self, indices=indices, lengths=torch.full_like(self.lengths, indices.shape[1]))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of indices with a valid one among them: slots int64 `[tokens, keys]`, 0 where not valid, and the
        mask of what is valid.
        """
        longest = int(self.lengths.max()) if self.lengths.numel() > 0 else 0
        for start in range(0, longest, KEYS_PER_STEP):
            lane = torch.arange(start, min(start + KEYS_PER_STEP, longest), device=self.indices.device)
            index = self.indices[:, start : start + lane.numel()].to(torch.int64)
            valid = (index >= 0) & (index < self.slots) & (lane < self.lengths[:, None])
            if bool(valid.any()):
                yield torch.where(valid, index, 0), valid

    def keys(self, slots: Tensor, valid: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `[tokens, keys, d_qk]`; zeros where not valid, whatever the cache holds there."""
        return torch.where(valid[..., None], gather_rows(self.cache, self.kv_format, slots), 0).to(dtype)


def token_lengths(lengths: Tensor | None, indices: Tensor, topk: int) -> Tensor:
    """int64 `[tokens]` within 0 and topk, for the tokens of indices `[b, s_q, topk]`."""
    b, s_q = indices.shape[:2]
    if lengths is None:
        return torch.full((b * s_q,), topk, dtype=torch.int64, device=indices.device)
    by_token = lengths.to(torch.int64).clamp(0, topk)
    return (by_token[:, None] if by_token.dim() == 1 else by_token).expand(b, s_q).reshape(b * s_q)


@dataclass(frozen=True)
class Attention:
    """Results of some tokens, in `compute_dtype`."""

    out: Tensor
    """`[tokens, h_q, d_v]`; 0 without keys."""
    max_logits: Tensor
    """`[tokens, h_q]`; -inf without keys."""
    lse: Tensor
    """`[tokens, h_q]`, natural log, without the sink; +inf without keys."""


def attend(
    q: Tensor,
    selections: Sequence[Selection],
    *,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    d_v: int = 512,
    compute_dtype: torch.dtype = torch.float32,
    probability_dtype: torch.dtype | None = None,
    one_token_at_a_time: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Attention:
    """Attention of each token over the rows that it selects, of all caches together; V is the first d_v of a row.

    With `s_i = scale * q . k_i`: `lse = ln(sum exp s_i)` and `out = sum exp(s_i - lse) v_i * sigmoid(lse - sink)`. A
    row that is selected twice counts twice.

    Args:
        q: `[tokens, h_q, d_qk]`, any float dtype.
        selections: the caches and the indices into them.
        softmax_scale: factor on the scores.
        attn_sink: float32 `[h_q]`, natural-log units.
        d_v: values of a row that are V.
        compute_dtype: dtype of everything after the rows have been read as bfloat16.
        probability_dtype: round the unnormalised probabilities to it before they meet V.
        one_token_at_a_time: makes the bits of a token independent of the other tokens, and of indices that select
            nothing.
        out_dtype: of out, where it is not compute_dtype; for long inputs out is most of the memory.
    """
    tokens, h_q, _ = q.shape
    out = torch.zeros((tokens, h_q, d_v), dtype=out_dtype or compute_dtype, device=q.device)
    max_logits = torch.full((tokens, h_q), float("-inf"), dtype=compute_dtype, device=q.device)
    lse = torch.full((tokens, h_q), float("inf"), dtype=compute_dtype, device=q.device)
    for part in _groups(q, selections, d_v, one_token_at_a_time):
        chosen = [selection.of_tokens(part) for selection in selections]
        if one_token_at_a_time:
            chosen = [selection.compacted() for selection in chosen]
        group = _attend_group(q[part].to(compute_dtype), chosen, softmax_scale, attn_sink, d_v, probability_dtype)
        out[part], max_logits[part], lse[part] = group.out, group.max_logits, group.lse
    return Attention(out, max_logits, lse)


def _groups(q: Tensor, selections: Sequence[Selection], d_v: int, one_at_a_time: bool) -> Iterator[slice]:
    tokens, h_q, d_qk = q.shape
    keys = min(KEYS_PER_STEP, max(selection.indices.shape[1] for selection in selections))
    per_token = 3 * keys * d_qk + h_q * (2 * keys + 4 * d_v + d_qk)
    count = 1 if one_at_a_time else max(1, SCRATCH_ELEMENTS // per_token)
    for start in range(0, tokens, count):
        yield slice(start, min(start + count, tokens))


def _attend_group(
    q: Tensor,
    selections: Sequence[Selection],
    softmax_scale: float,
    attn_sink: Tensor | None,
    d_v: int,
    probability_dtype: torch.dtype | None,
) -> Attention:
    softmax = OnlineSoftmax(q, d_v, probability_dtype)
    has_key = torch.zeros(q.shape[0], dtype=torch.bool, device=q.device)
    for selection in selections:
        for slots, valid in selection.blocks():
            keys = selection.keys(slots, valid, q.dtype)
            softmax.add(_scores(q, keys, valid, softmax_scale), keys[..., :d_v])
            has_key |= valid.any(-1)
    has_key = has_key[:, None]
    lse = torch.where(has_key, softmax.lse(), float("inf"))
    out = torch.where(has_key[..., None], softmax.out() * _share(lse, attn_sink)[..., None], 0.0)
    return Attention(out, torch.where(has_key, softmax.max_logits(), float("-inf")), lse)


def _scores(q: Tensor, keys: Tensor, valid: Tensor, softmax_scale: float) -> Tensor:
    scores = torch.bmm(q, keys.transpose(1, 2)).mul_(softmax_scale)
    return scores.masked_fill_(~valid[:, None, :], float("-inf"))


def _share(lse: Tensor, attn_sink: Tensor | None) -> Tensor:
    """`exp(lse) / (exp(lse) + exp(sink))`, the part of the softmax that is left to the keys."""
    return torch.ones_like(lse) if attn_sink is None else torch.sigmoid(lse - attn_sink.to(lse.dtype))


# ---- Gradients.


@dataclass(frozen=True)
class Gradients:
    """What `attend_backward` gives, in `compute_dtype`."""

    q: Tensor
    """`[tokens, h_q, d_qk]`."""
    caches: list[Tensor | None]
    """`[num_blocks, page, 1, d_qk]` of each BF16 selection, None of the others."""
    attn_sink: Tensor | None
    """`[h_q]`."""


def attend_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    selections: Sequence[Selection],
    *,
    softmax_scale: float,
    attn_sink: Tensor | None = None,
    compute_dtype: torch.dtype = torch.float32,
    probability_dtype: torch.dtype | None = None,
    deterministic: bool = False,
) -> Gradients:
    """Gradients of `attend`, with everything computed again: they carry no rounding of out or lse.

    With p the softmax over keys and sink, and `delta = d_out . out`: `d_v_i = p_i d_out`,
    `d_s_i = p_i (d_out . v_i - delta) + exp(s_i - lse) d_lse`, `d_sink = -p_sink delta`. A row is added to as often as
    it is selected; rows that no valid index names get 0.

    Args:
        d_out: `[tokens, h_q, d_v]`.
        d_lse: `[tokens, h_q]`, of the natural logarithm.
        q, selections, softmax_scale, attn_sink, compute_dtype: as in `attend`.
        probability_dtype: rounds what kernels round: out, and probabilities and their gradients before they meet rows.
        deterministic: the gradients of rows have the same bits on every run, on a GPU too.
    """
    d_v = d_out.shape[-1]
    d_q = torch.zeros(q.shape, dtype=compute_dtype, device=q.device)
    d_rows = [_zero_gradient(selection, compute_dtype) for selection in selections]
    d_sink = None if attn_sink is None else torch.zeros(attn_sink.shape, dtype=compute_dtype, device=q.device)
    for part in _groups(q, selections, d_v, one_at_a_time=False):
        chosen = [selection.of_tokens(part) for selection in selections]
        rows, dout = q[part].to(compute_dtype), d_out[part].to(compute_dtype)
        forward = _attend_group(rows, chosen, softmax_scale, attn_sink, d_v, probability_dtype)
        share = _share(forward.lse, attn_sink)
        has_key = forward.lse != float("inf")
        out = forward.out if probability_dtype is None else forward.out.to(probability_dtype).to(compute_dtype)
        delta = torch.where(has_key, (dout * out).sum(-1), 0.0)
        if d_sink is not None:
            d_sink -= torch.where(has_key, (1 - share) * delta, 0.0).sum(0)
        for selection, d_row in zip(chosen, d_rows, strict=True):
            for slots, valid in selection.blocks():
                keys = selection.keys(slots, valid, compute_dtype)
                p = (_scores(rows, keys, valid, softmax_scale) - forward.lse[..., None]).exp_()
                p_out = p * share[..., None]
                d_p = torch.bmm(dout, keys[..., :d_v].transpose(1, 2))
                d_s = p_out * (d_p - delta[..., None]) + p * d_lse[part].to(compute_dtype)[..., None]
                d_s = torch.where(valid[:, None] & has_key[..., None], d_s, 0.0).mul_(softmax_scale)
                if probability_dtype is not None:
                    d_s, p_out = (rounded.to(probability_dtype).to(compute_dtype) for rounded in (d_s, p_out))
                d_q[part] += torch.bmm(d_s, keys)
                if d_row is not None:
                    d_keys = torch.bmm(d_s.transpose(1, 2), rows)
                    d_keys[..., :d_v] += torch.bmm(p_out.transpose(1, 2), dout)
                    _add_rows(d_row, slots[valid], d_keys[valid], deterministic)
    caches = [None if row is None else row.view(each.cache.shape) for row, each in zip(d_rows, selections, strict=True)]
    return Gradients(d_q, caches, d_sink)


def _add_rows(sums: Tensor, slots: Tensor, rows: Tensor, deterministic: bool) -> None:
    if deterministic and sums.is_cuda:
        sums.index_put_((slots,), rows, accumulate=True)  # sorts; index_add_ adds in any order there
    else:
        sums.index_add_(0, slots, rows)


def _zero_gradient(selection: Selection, dtype: torch.dtype) -> Tensor | None:
    if selection.kv_format is not KVFormat.BF16:
        return None
    return torch.zeros((selection.slots, selection.cache.shape[-1]), dtype=dtype, device=selection.cache.device)


# ---- The operators.


def _selections(
    cache: Tensor,
    kv_format: str,
    indices: Tensor,
    lengths: Tensor | None,
    extra: Tensor | None,
    extra_kv_format: str | None,
    extra_indices: Tensor | None,
    extra_lengths: Tensor | None,
) -> list[Selection]:
    selections = [Selection.of(cache, kv_format, indices, lengths)]
    if extra is not None and extra_kv_format is not None and extra_indices is not None:
        selections.append(Selection.of(extra, extra_kv_format, extra_indices, extra_lengths))
    return selections


@torch.no_grad()
def sparse_decode(
    q: Tensor,
    k_cache: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    tile_scheduler_metadata: Tensor | None,
    num_splits: Tensor | None,
    attn_sink: Tensor | None,
    kv_format: str,
    extra_kv_format: str | None,
    head_dim_v: int,
    softmax_scale: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_sparse_decode`. The schedule is checked, and has no influence."""
    problem_sparse.check_sparse_decode(
        q,
        k_cache,
        indices,
        topk_length,
        extra_k_cache,
        extra_indices,
        extra_topk_length,
        tile_scheduler_metadata,
        num_splits,
        attn_sink,
        kv_format,
        extra_kv_format,
        head_dim_v,
        softmax_scale,
        batch_invariant,
    )
    b, s_q, h_q, _ = q.shape
    extra = (extra_k_cache, extra_kv_format, extra_indices, extra_topk_length)
    result = attend(
        q.flatten(0, 1),
        _selections(k_cache, kv_format, indices, topk_length, *extra),
        softmax_scale=softmax_scale,
        attn_sink=attn_sink,
        d_v=head_dim_v,
        one_token_at_a_time=batch_invariant,
        out_dtype=q.dtype,
    )
    lse = result.lse.view(b, s_q, h_q).transpose(1, 2).contiguous()
    return result.out.view(b, s_q, h_q, head_dim_v), lse


@torch.no_grad()
def sparse_decode_out(*args: Tensor) -> None:
    """`torch.ops.flash_mla.reference_sparse_decode_out`: the same, into the last two arguments."""
    *inputs, out, lse = args
    problem_sparse.check_sparse_decode(*args)
    result_out, result_lse = sparse_decode(*inputs)  # type: ignore[arg-type]
    out.copy_(result_out)
    lse.copy_(result_lse)


@torch.no_grad()
def plan_sparse_decode(
    requests: Tensor,
    topk_length: Tensor | None,
    extra_topk_length: Tensor | None,
    s_q: int,
    h_q: int,
    topk: int,
    extra_topk: int,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_plan_sparse_decode`.

    A request has as many blocks as the longest of its tokens, those of the primary cache first.
    """
    problem_sparse.check_sparse_plan(requests, topk_length, extra_topk_length, s_q, h_q, topk, extra_topk)
    return plan_blocks(blocks_per_request(requests, topk_length, extra_topk_length, topk, extra_topk))


def blocks_per_request(
    requests: Tensor, topk_length: Tensor | None, extra_topk_length: Tensor | None, topk: int, extra_topk: int
) -> Tensor:
    """int64 `[b]`: schedule blocks of each request, those of the longest of its tokens."""
    blocks = blocks_of(_request_lengths(requests, topk_length, topk)).clamp_(min=1)
    if extra_topk > 0:
        blocks += blocks_of(_request_lengths(requests, extra_topk_length, extra_topk))
    return blocks


def _request_lengths(requests: Tensor, lengths: Tensor | None, topk: int) -> Tensor:
    """int64 `[b]`: the length of the longest token of each request."""
    if lengths is None:
        return torch.full((requests.shape[0],), topk, dtype=torch.int64, device=requests.device)
    longest = lengths if lengths.dim() == 1 else lengths.amax(1)
    return longest.to(torch.int64).clamp(0, topk)


@torch.no_grad()
def sparse_prefill(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    kv_format: str,
    extra_kv_format: str | None,
    d_v: int,
    sm_scale: float,
    lse_base: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_sparse_prefill`: out, max_logits and lse."""
    problem_sparse.check_sparse_prefill(
        q,
        kv,
        indices,
        topk_length,
        extra_k_cache,
        extra_indices,
        extra_topk_length,
        attn_sink,
        kv_format,
        extra_kv_format,
        d_v,
        sm_scale,
        lse_base,
        deterministic,
    )
    extra = (extra_k_cache, extra_kv_format, extra_indices, extra_topk_length)
    selections = _selections(kv, kv_format, indices, topk_length, *extra)
    result = attend(q, selections, softmax_scale=sm_scale, attn_sink=attn_sink, d_v=d_v, out_dtype=q.dtype)
    lse = result.lse * LOG2_E if lse_base == "2" else result.lse
    return result.out, result.max_logits, lse


@torch.no_grad()
def sparse_prefill_out(*args: Tensor) -> None:
    """`torch.ops.flash_mla.reference_sparse_prefill_out`: the same, into the last three arguments."""
    *inputs, out, max_logits, lse = args
    problem_sparse.check_sparse_prefill(*args)
    for given, result in zip((out, max_logits, lse), sparse_prefill(*inputs), strict=True):  # type: ignore[arg-type]
        given.copy_(result)


@torch.no_grad()
def sparse_prefill_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    topk_length: Tensor | None,
    extra_k_cache: Tensor | None,
    extra_indices: Tensor | None,
    extra_topk_length: Tensor | None,
    attn_sink: Tensor | None,
    kv_format: str,
    extra_kv_format: str | None,
    sm_scale: float,
    lse_base: str,
    deterministic: bool,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_sparse_prefill_backward`: gradients of q, kv, extra_k_cache and attn_sink.

    Empty where an input is not there, or is a cache of bytes. out and lse are for kernels that start from them.
    """
    del out, lse
    extra = (extra_k_cache, extra_kv_format, extra_indices, extra_topk_length)
    gradients = attend_backward(
        d_out,
        d_lse * LOG2_E if lse_base == "2" else d_lse,
        q,
        _selections(kv, kv_format, indices, topk_length, *extra),
        softmax_scale=sm_scale,
        attn_sink=attn_sink,
        deterministic=deterministic,
    )
    none = q.new_empty(0)
    d_kv, d_extra = (*gradients.caches, None)[:2]
    return (
        gradients.q.to(q.dtype),
        none if d_kv is None else d_kv.to(kv.dtype).view(kv.shape),
        none if d_extra is None or extra_k_cache is None else d_extra.to(q.dtype).view(extra_k_cache.shape),
        q.new_empty(0, dtype=torch.float32) if gradients.attn_sink is None else gradients.attn_sink,
    )
