"""Dense attention over sequences laid end to end, and its gradients, in PyTorch.

Sequences are taken one by one, in blocks of queries and of keys, so memory stays bounded whatever the lengths. The
running lengths are read on the host.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flash_mla import problem_prefill
from flash_mla.backends.reference_softmax import OnlineSoftmax
from flash_mla.errors import wanted

KEYS_PER_STEP = 512
SCRATCH_ELEMENTS = 1 << 23
"""Queries are taken together as long as their scores stay within this many numbers."""


@dataclass(frozen=True)
class _Block:
    """Some queries of one sequence, with the keys that they see."""

    queries: slice
    keys: slice
    """All of the sequence that some of the queries see."""
    first_limit: int
    """Keys that the first of the queries sees; every further one sees one more, where the call is causal."""


@dataclass(frozen=True)
class _Call:
    """Tensors of a call by KV head: q `[h_kv, group, tokens, d]`, k and v `[h_kv, tokens, d]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    softmax_scale: float
    causal: bool
    probability_dtype: torch.dtype | None
    compute_dtype: torch.dtype

    def rows(self, tensor: Tensor, block: _Block) -> Tensor:
        """`[h_kv, group * queries, d]` of a tensor like q."""
        return tensor[:, :, block.queries].to(self.compute_dtype).flatten(1, 2)

    def key_steps(self, block: _Block) -> Iterator[tuple[slice, Tensor, Tensor, Tensor | None]]:
        """Blocks of keys: where they are, k and v `[h_kv, keys, d]`, and what is masked `[queries, keys]`."""
        for start in range(block.keys.start, block.keys.stop, KEYS_PER_STEP):
            where = slice(start, min(start + KEYS_PER_STEP, block.keys.stop))
            masked = None
            if self.causal:
                key = torch.arange(where.start, where.stop, device=self.q.device) - block.keys.start
                query = torch.arange(block.queries.stop - block.queries.start, device=self.q.device)
                masked = key >= (block.first_limit + query)[:, None]
            yield where, self.k[:, where].to(self.compute_dtype), self.v[:, where].to(self.compute_dtype), masked

    def scores(self, rows: Tensor, keys: Tensor, masked: Tensor | None) -> Tensor:
        """`[h_kv, group * queries, keys]`, -inf where masked."""
        scores = torch.bmm(rows, keys.transpose(1, 2)).mul_(self.softmax_scale)
        if masked is not None:
            n, _, count = scores.shape
            scores.view(n, -1, masked.shape[0], count).masked_fill_(masked, float("-inf"))
        return scores

    def attend(self, block: _Block) -> tuple[Tensor, Tensor, Tensor]:
        """rows of q, out `[h_kv, group * queries, d_v]` and lse `[h_kv, group * queries]` of a block."""
        rows = self.rows(self.q, block)
        softmax = OnlineSoftmax(rows, self.v.shape[-1], self.probability_dtype)
        for _, keys, values, masked in self.key_steps(block):
            softmax.add(self.scores(rows, keys, masked), values)
        lse = softmax.lse()
        sees_a_key = lse != float("-inf")
        return rows, torch.where(sees_a_key[..., None], softmax.out(), 0.0), torch.where(sees_a_key, lse, float("inf"))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    probability_dtype: torch.dtype | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each sequence's queries over its keys.

    `lse = ln(sum_i exp(scale * q . k_i))`, `out = sum_i exp(scale * q . k_i - lse) v_i`. With `causal`, query j of a
    sequence of s_q queries and s_kv keys sees keys `<= j + s_kv - s_q`. A query that sees no key, or that stands in no
    sequence, gets out 0 and lse +inf.

    Args:
        q: `[tokens_q, h_q, d_qk]`.
        k: `[tokens_kv, h_kv, d_qk]`.
        v: `[tokens_kv, h_kv, d_v]`.
        cu_seqlens_qo, cu_seqlens_kv: int32 `[sequences + 1]`, running token counts.
        softmax_scale: factor on the scores.
        causal: mask aligned to the bottom right.
        compute_dtype: dtype of everything after reading the inputs.
        probability_dtype: round the unnormalised probabilities to it before they meet V.
        out_dtype: of out, where it is not compute_dtype.

    Returns:
        out `[tokens_q, h_q, d_v]` and lse `[tokens_q, h_q]` (stride 1 along the tokens), both of `compute_dtype`.

    Raises:
        ValueError: running lengths that fall, or that end beyond the tokens.
    """
    tokens, h_q, _ = q.shape
    call = _call(q, k, v, softmax_scale, causal, compute_dtype, probability_dtype)
    h_kv, group = call.q.shape[:2]
    out = torch.zeros((tokens, h_q, v.shape[-1]), dtype=out_dtype or compute_dtype, device=q.device)
    out_by_head = _by_kv_head(out, h_kv)
    lse = torch.full((h_kv, group, tokens), float("inf"), dtype=compute_dtype, device=q.device)
    for block in _blocks(q, k, cu_seqlens_qo, cu_seqlens_kv, causal):
        _, block_out, block_lse = call.attend(block)
        out_by_head[:, :, block.queries] = torch.unflatten(block_out, 1, (group, -1))
        lse[:, :, block.queries] = torch.unflatten(block_lse, 1, (group, -1))
    return out, lse.view(h_q, tokens).t()


def attend_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    compute_dtype: torch.dtype = torch.float32,
    probability_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend`, with out and lse computed again: they carry no rounding of either.

    With `p_i = exp(s_i - lse)` and `delta = d_out . out`: `d_v_i = p_i d_out` and
    `d_s_i = p_i (d_out . v_i - delta + d_lse)`.

    Args:
        d_out: `[tokens_q, h_q, d_v]`.
        d_lse: `[tokens_q, h_q]`.
        q, k, v, cu_seqlens_qo, cu_seqlens_kv, softmax_scale, causal, compute_dtype: as in `attend`.
        probability_dtype: round out, the probabilities and the gradients of the unscaled scores to it, as tensor-core
            kernels do.

    Returns:
        Gradients of q, k and v, of `compute_dtype`.
    """
    call = _call(q, k, v, softmax_scale, causal, compute_dtype, probability_dtype)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor if probability_dtype is None else tensor.to(probability_dtype).to(compute_dtype)

    d_out_by_head, d_lse_by_head = _by_kv_head(d_out, k.shape[1]), _by_kv_head(d_lse[..., None], k.shape[1])
    gradients = tuple(torch.zeros(tensor.shape, dtype=compute_dtype, device=q.device) for tensor in (q, k, v))
    d_q, d_k, d_v = _by_kv_head(gradients[0], k.shape[1]), gradients[1].transpose(0, 1), gradients[2].transpose(0, 1)
    for block in _blocks(q, k, cu_seqlens_qo, cu_seqlens_kv, causal):
        rows, out, lse = call.attend(block)
        dout, dlse = call.rows(d_out_by_head, block), call.rows(d_lse_by_head, block)
        sees_a_key = (lse != float("inf"))[..., None]
        rows, dout = torch.where(sees_a_key, rows, 0.0), torch.where(sees_a_key, dout, 0.0)
        delta = (dout * rounded(out)).sum(-1, keepdim=True)
        d_rows = torch.zeros_like(rows)
        for where, keys, values, masked in call.key_steps(block):
            p = rounded((call.scores(rows, keys, masked) - lse[..., None]).exp_())
            d_p = torch.bmm(dout, values.transpose(1, 2))
            d_s = rounded(torch.where(sees_a_key, p * (d_p - delta + dlse), 0.0)).mul_(softmax_scale)
            d_rows += torch.bmm(d_s, keys)
            d_k[:, where] += torch.bmm(d_s.transpose(1, 2), rows)
            d_v[:, where] += torch.bmm(p.transpose(1, 2), dout)
        d_q[:, :, block.queries] = torch.unflatten(d_rows, 1, (call.q.shape[1], -1))
    return gradients[0], gradients[1], gradients[2]


def _call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    compute_dtype: torch.dtype,
    probability_dtype: torch.dtype | None,
) -> _Call:
    by_head = _by_kv_head(q, k.shape[1])
    return _Call(by_head, k.transpose(0, 1), v.transpose(0, 1), softmax_scale, causal, probability_dtype, compute_dtype)


def _by_kv_head(rows: Tensor, h_kv: int) -> Tensor:
    """`[tokens, h_q, d]` as `[h_kv, group, tokens, d]`."""
    return torch.unflatten(rows, 1, (h_kv, rows.shape[1] // h_kv)).permute(1, 2, 0, 3)


def _blocks(q: Tensor, k: Tensor, cu_seqlens_qo: Tensor, cu_seqlens_kv: Tensor, causal: bool) -> Iterator[_Block]:
    """Blocks of queries that may see keys, in order."""
    starts_q = _running_lengths("cu_seqlens_qo", cu_seqlens_qo, q.shape[0])
    starts_k = _running_lengths("cu_seqlens_kv", cu_seqlens_kv, k.shape[0])
    step = max(1, SCRATCH_ELEMENTS // (q.shape[1] * KEYS_PER_STEP))
    for (begin_q, end_q), (begin_k, end_k) in zip(pairwise(starts_q), pairwise(starts_k), strict=True):
        for start in range(begin_q, end_q, step):
            stop = min(start + step, end_q)
            first_limit = end_k - begin_k
            last_limit = first_limit
            if causal:
                first_limit += 1 + start - end_q
                last_limit += stop - end_q
            if last_limit > 0:
                yield _Block(slice(start, stop), slice(begin_k, begin_k + last_limit), first_limit)


def _running_lengths(name: str, running: Tensor, tokens: int) -> list[int]:
    starts: list[int] = running.tolist()
    if starts[0] != 0 or starts[-1] > tokens or any(b < a for a, b in pairwise(starts)):
        raise ValueError(wanted(name, f"running lengths from 0 to at most {tokens} tokens", starts))
    return starts


def _check_longest(name: str, running: Tensor, longest: int) -> None:
    if running.shape[0] > 1 and int(running.diff().max()) > longest:
        raise ValueError(wanted(name, "at least the longest sequence", f"{longest} for {int(running.diff().max())}"))


# ---- The operators.


@torch.no_grad()
def dense_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_dense_prefill`: out and lse."""
    problem_prefill.check_dense_prefill(
        q,
        k,
        v,
        cu_seqlens_qo,
        cu_seqlens_kv,
        max_seqlen_qo,
        max_seqlen_kv,
        softmax_scale,
        causal,
        deterministic,
    )
    _check_longest("max_seqlen_qo", cu_seqlens_qo, max_seqlen_qo)
    _check_longest("max_seqlen_kv", cu_seqlens_kv, max_seqlen_kv)
    tensors = (q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    return attend(*tensors, softmax_scale=softmax_scale, causal=causal, out_dtype=q.dtype)


@torch.no_grad()
def dense_prefill_backward(
    d_out: Tensor,
    d_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_dense_prefill_backward`: gradients of q, k and v.

    out and lse are for kernels that start from them.
    """
    del out, lse, max_seqlen_qo, max_seqlen_kv, deterministic
    tensors = (d_out, d_lse, q, k, v, cu_seqlens_qo, cu_seqlens_kv)
    gradients = attend_backward(*tensors, softmax_scale=softmax_scale, causal=causal)
    d_q, d_k, d_v = (gradient.to(q.dtype) for gradient in gradients)
    return d_q, d_k, d_v
