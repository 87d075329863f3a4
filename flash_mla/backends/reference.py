"""The reference backend: what the operators mean, in PyTorch, on any device. Here: dense decode and merging.

`attend` is the definition. It reads the cache in blocks of keys with an online softmax, so memory stays bounded
whatever the lengths, and it masks by selecting, so bytes that no length reaches never influence a result. It reads
the lengths on the host, so unlike the CUDA kernels it synchronises and cannot be captured in a CUDA graph.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flash_mla import _ops, errors, problem
from flash_mla.backends import reference_kv_cache, reference_prefill, reference_sparse
from flash_mla.backends.reference_kv_cache import gather_rows
from flash_mla.backends.reference_schedule import plan_in_torch
from flash_mla.backends.reference_softmax import OnlineSoftmax
from flash_mla.kv_format import KVFormat

KEYS_PER_STEP = 256
SCRATCH_ELEMENTS = 1 << 26
"""Requests and queries are taken together as long as their scores and accumulators stay within this many numbers."""


def attend(
    q: Tensor,
    k_cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    *,
    softmax_scale: float,
    causal: bool = False,
    attn_sink: Tensor | None = None,
    head_dim_v: int = problem.HEAD_DIM_V,
    compute_dtype: torch.dtype = torch.float32,
    probability_dtype: torch.dtype | None = None,
    one_request_at_a_time: bool = False,
    kv_format: KVFormat | None = None,
    descale_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Paged multi-head latent attention; K is the cache row and V its first `head_dim_v` values.

    With `s_i = scale * q . k_i` over the keys that a query sees: `lse = ln(sum exp s_i)`,
    `out = sum exp(s_i - lse) v_i * sigmoid(lse - sink)`. Query j of a causal request sees keys
    `< seqlen - (s_q - 1 - j)`. A query that sees no key gets out 0 and lse +inf.

    Args:
        q: `[b, s_q, h_q, d_qk]`, any float dtype.
        k_cache: `[num_blocks, page, h_kv, d_qk]`, any strides; or of `kv_format`.
        block_table: int32 `[b, max_blocks]`; entries at or past the length are not used.
        cache_seqlens: int32 `[b]`, in keys.
        softmax_scale: factor on the scores.
        attn_sink: float32 `[h_q]`, natural-log units; lse does not include it.
        compute_dtype: dtype of everything after reading the inputs.
        probability_dtype: round the unnormalised probabilities to it before they meet V, as tensor-core kernels do.
        one_request_at_a_time: makes the bits of a request independent of the rest of the batch.
        kv_format: format of a cache of bytes.
        descale_k: float32, one number: what the values of an e4m3 cache without a format are multiplied by.

    Returns:
        out `[b, s_q, h_q, head_dim_v]` and lse `[b, h_q, s_q]`, both of `compute_dtype`.

    Raises:
        ValueError: a length is negative or longer than its block table, or a used entry of it names no page.
    """
    b, s_q, h_q, _ = q.shape
    lengths = cache_seqlens.to(torch.int64)
    _check_lengths_fit(lengths, block_table, page=k_cache.shape[1])
    out = torch.zeros((b, s_q, h_q, head_dim_v), dtype=compute_dtype, device=q.device)
    lse = torch.full((b, h_q, s_q), float("inf"), dtype=compute_dtype, device=q.device)
    lse_by_query = lse.transpose(1, 2)
    cache = PagedCache(k_cache, kv_format, descale_k)
    # The last query of a request sees all its keys; the ones before it see fewer where the call is causal.
    hidden = torch.arange(s_q - 1, -1, -1, device=q.device) if causal else torch.zeros(s_q, device=q.device).long()
    visible = lengths[:, None] - hidden
    for requests, queries in _groups(lengths, s_q, h_q, head_dim_v, one_request_at_a_time):
        part_out, part_lse = _attend_group(
            q[requests, queries].to(compute_dtype),
            cache,
            block_table[requests],
            lengths[requests],
            visible[requests, queries],
            softmax_scale,
            head_dim_v,
            probability_dtype,
        )
        out[requests, queries] = part_out
        lse_by_query[requests, queries] = part_lse
    if attn_sink is not None:
        share = torch.sigmoid(lse_by_query - attn_sink.to(compute_dtype))
        out *= torch.where(visible[:, :, None] > 0, share, 0.0)[..., None]
    return out, lse


def _check_lengths_fit(lengths: Tensor, block_table: Tensor, page: int) -> None:
    if lengths.numel() == 0:
        return
    shortest, longest = int(lengths.min()), int(lengths.max())
    capacity = block_table.shape[1] * page
    if shortest < 0 or longest > capacity:
        given = shortest if shortest < 0 else longest
        raise ValueError(
            errors.wanted("cache_seqlens", f"lengths from 0 to max_blocks * page_block_size = {capacity}", given)
        )


def _groups(
    lengths: Tensor, s_q: int, h_q: int, head_dim_v: int, one_at_a_time: bool
) -> Iterator[tuple[Tensor, slice]]:
    """Requests of similar length with as many of their queries as the scratch memory allows. Skips empty requests."""
    per_query = h_q * (3 * head_dim_v + 2 * KEYS_PER_STEP)
    queries = max(1, min(s_q, SCRATCH_ELEMENTS // per_query))
    count = 1 if one_at_a_time else max(1, SCRATCH_ELEMENTS // (per_query * queries + 1024 * KEYS_PER_STEP))
    order = lengths.argsort(stable=True)
    order = order[lengths[order] > 0]
    for requests in torch.split(order, count) if order.numel() > 0 else ():
        for start in range(0, s_q, queries):
            yield requests, slice(start, min(start + queries, s_q))


def _attend_group(
    q: Tensor,
    cache: "PagedCache",
    block_table: Tensor,
    lengths: Tensor,
    visible: Tensor,
    softmax_scale: float,
    head_dim_v: int,
    probability_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    """Online softmax over the keys of `n` requests.

    q `[n, s, h_q, d]`; visible int64 `[n, s]`: number of leading keys that a query sees. Returns out `[n, s, h_q,
    d_v]` and lse `[n, s, h_q]`.
    """
    n, s, h_q, d = q.shape
    h_kv = cache.k_cache.shape[2]
    group = h_q // h_kv
    q = q.view(n, s, h_kv, group, d).transpose(1, 2).reshape(n * h_kv, s * group, d)
    softmax = OnlineSoftmax(q, head_dim_v, probability_dtype)
    longest = int(lengths.max())
    for start in range(0, longest, KEYS_PER_STEP):
        position = torch.arange(start, min(start + KEYS_PER_STEP, longest), device=q.device)
        keys = gather_keys(cache, block_table, lengths, position).to(q.dtype).transpose(1, 2).flatten(0, 1)
        scores = torch.bmm(q, keys.transpose(1, 2)).mul_(softmax_scale).view(n, h_kv, s, group, -1)
        masked = position >= visible[:, :, None]
        scores.masked_fill_(masked[:, None, :, None, :], float("-inf"))
        softmax.add(scores.view(n * h_kv, s * group, -1), keys[..., :head_dim_v])

    def by_query(rows: Tensor) -> Tensor:
        return rows.view(n, h_kv, s, group, -1).transpose(1, 2).reshape(n, s, h_q, -1)

    sees_a_key = (visible > 0)[:, :, None]
    out = torch.where(sees_a_key[..., None], by_query(softmax.out()), 0.0)
    lse = torch.where(sees_a_key, by_query(softmax.lse())[..., 0], float("inf"))
    return out, lse


@dataclass(frozen=True)
class PagedCache:
    """A paged cache whose rows are values, or bytes of a format."""

    k_cache: Tensor
    kv_format: KVFormat | None = None
    descale_k: Tensor | None = None

    def rows(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """Values `[*pages.shape, h_kv, d]` of slots that are there."""
        if self.kv_format is not None:
            return gather_rows(self.k_cache, self.kv_format, pages * self.k_cache.shape[1] + offsets).unsqueeze(-2)
        if self.descale_k is None:
            return self.k_cache[pages, offsets]
        codes = self.k_cache.view(torch.uint8)[pages, offsets]
        return codes.view(torch.float8_e4m3fn).float() * self.descale_k


def gather_keys(cache: PagedCache, block_table: Tensor, lengths: Tensor, position: Tensor) -> Tensor:
    """Cache rows `[n, keys, h_kv, d]` at `position` `[keys]` of each request; zeros at and past its length."""
    num_blocks, page = cache.k_cache.shape[:2]
    live = position < lengths[:, None]
    pages = torch.where(live, block_table[:, position // page], 0).to(torch.int64)
    if bool(((pages < 0) | (pages >= num_blocks)).any()):
        wanted = f"entries below num_blocks = {num_blocks} within cache_seqlens"
        raise ValueError(errors.wanted("block_table", wanted, f"entries from {int(pages.min())} to {int(pages.max())}"))
    return torch.where(live[:, :, None, None], cache.rows(pages, position % page), 0)


# ---- The operators.


@torch.no_grad()
def dense_decode(
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
    """`torch.ops.flash_mla.reference_dense_decode`. The schedule is checked, and has no influence."""
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
    out, lse = attend(
        q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        attn_sink=attn_sink,
        head_dim_v=head_dim_v,
        one_request_at_a_time=batch_invariant,
    )
    return out.to(q.dtype), lse


@torch.no_grad()
def dense_decode_out(*args: Any) -> None:
    """`torch.ops.flash_mla.reference_dense_decode_out`: the same, into the last two arguments."""
    *inputs, out, lse = args
    problem.check_dense_decode(*args)
    result_out, result_lse = dense_decode(*inputs)
    out.copy_(result_out)
    lse.copy_(result_lse)


@torch.no_grad()
def dense_decode_fp8(
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
    descale_q: Tensor | None,
    descale_k: Tensor | None,
    kv_format: str | None,
) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_dense_decode_fp8`: a cache of a format, or of e4m3 values times descale_k.

    An e4m3 q stands for q times descale_q.
    """
    problem.check_dense_decode_fp8(
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
        descale_q,
        descale_k,
        kv_format,
    )
    out, lse = attend(
        q if descale_q is None else q.float() * descale_q,
        k_cache,
        block_table,
        cache_seqlens,
        softmax_scale=softmax_scale,
        causal=causal,
        attn_sink=attn_sink,
        head_dim_v=head_dim_v,
        one_request_at_a_time=batch_invariant,
        kv_format=None if kv_format is None else KVFormat(kv_format),
        descale_k=descale_k,
    )
    return out.to(problem.out_dtype(q)), lse


@torch.no_grad()
def dense_decode_fp8_out(*args: Any) -> None:
    """`torch.ops.flash_mla.reference_dense_decode_fp8_out`: the same, into the last two arguments."""
    *inputs, out, lse = args
    problem.check_dense_decode_fp8(*args)
    result_out, result_lse = dense_decode_fp8(*inputs)
    out.copy_(result_out)
    lse.copy_(result_lse)


@torch.no_grad()
def plan_dense_decode(cache_seqlens: Tensor, s_q: int, h_q: int, h_kv: int) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_plan_dense_decode`."""
    problem.check_plan(cache_seqlens, s_q, h_q, h_kv)
    return plan_in_torch(cache_seqlens)


@torch.no_grad()
def merge_attention_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`torch.ops.flash_mla.reference_merge_attention_states`: `out = sum_i exp(lse_i - lse) out_i`, `lse = ln(sum_i
    exp lse_i)`.

    Parts without keys (lse +inf or -inf) are left out, whatever their out holds.
    """
    problem.check_merge(outs, lses)
    lse = torch.stack(list(lses))
    empty = lse.isinf()
    lse = lse.masked_fill(empty, float("-inf"))
    none = empty.all(0)
    weight = torch.where(empty, 0.0, lse.masked_fill(none, 0.0).softmax(0))
    total = lse.logsumexp(0)
    if outs[0].dim() == 4:
        weight, empty = weight.transpose(2, 3), empty.transpose(2, 3)
    merged = torch.zeros_like(outs[0], dtype=torch.float32)
    for part, part_weight, part_empty in zip(outs, weight, empty, strict=True):
        merged += torch.where(part_empty[..., None], 0.0, part.float() * part_weight[..., None])
    return merged.to(outs[0].dtype), total.masked_fill(none, float("inf"))


_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {
    "dense_decode": dense_decode,
    "dense_decode_out": dense_decode_out,
    "plan_dense_decode": plan_dense_decode,
    "merge_attention_states": merge_attention_states,
    "dense_decode_fp8": dense_decode_fp8,
    "dense_decode_fp8_out": dense_decode_fp8_out,
    "sparse_decode": reference_sparse.sparse_decode,
    "sparse_decode_out": reference_sparse.sparse_decode_out,
    "plan_sparse_decode": reference_sparse.plan_sparse_decode,
    "sparse_prefill": reference_sparse.sparse_prefill,
    "sparse_prefill_out": reference_sparse.sparse_prefill_out,
    "sparse_prefill_backward": reference_sparse.sparse_prefill_backward,
    "dense_prefill": reference_prefill.dense_prefill,
    "dense_prefill_backward": reference_prefill.dense_prefill_backward,
    "append_kv_cache": reference_kv_cache.append_kv_cache,
    "dequantize_kv_cache": reference_kv_cache.dequantize_kv_cache,
}

_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Tell, once for each reason, that CUDA tensors are served by the slow reference."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"flash_mla: the reference backend serves CUDA tensors (slow): {reason}", RuntimeWarning, stacklevel=5
        )


def forget_warnings() -> None:
    """Make `warn_once` warn again."""
    _warned.clear()


def _with_warning(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def serve(*args: Any) -> Any:
        warn_once(str(_ops.why_not_native(name)))
        return function(*args)

    return serve


def _register() -> None:
    for name, function in _IMPLEMENTATIONS.items():
        _ops.implement(f"reference_{name}", function, "CompositeExplicitAutograd")
        _ops.implement(name, function, "CPU")
        if name not in _ops.NATIVE:
            _ops.implement(name, _with_warning(name, function), "CUDA")


_register()
