"""Dense attention over sequences laid end to end, forward, in Triton.

One program computes one tile of queries of one sequence for one head. The running lengths stay on the device: a program
looks up which sequence its tile belongs to, so calls do not synchronise and can be captured in a CUDA graph.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton import tuning
from flash_mla.backends.triton.config import Gpu, Tile, prefill_tiles
from flash_mla.backends.triton.language import (
    D_ROPE,
    LN2,
    LOG2E,
    dot,
    final_factor,
    jit,
    jit_for_any_value,
    lse_base_2,
    online_softmax,
    rounded,
    times,
    wide,
)
from flash_mla.backends.triton.launch import OPTIONS, device_of
from flash_mla.problem_prefill import HEAD_DIM_V

D_HEAD = tl.constexpr(HEAD_DIM_V)
"""Values of a row of v, and of one of q and k before the RoPE part."""


@jit
def load_running(running: tl.tensor, index: tl.tensor, tokens: tl.tensor) -> Any:
    """A running length. One beyond the tokens is the caller's mistake, and must not become a wild address."""
    return tl.minimum(tl.maximum(tl.load(running + index), 0), tokens)


@jit
def sequence_of(
    cu_seqlens_qo: tl.tensor, place: tl.tensor, num_sequences: tl.tensor, tokens: tl.tensor, BLOCK_M: tl.constexpr
) -> Any:
    """The sequence to which place number `place` on the line of query tiles belongs, and the tile's number in it.

    Sequence s begins at place `cu_seqlens_qo[s] // BLOCK_M + s`. This leaves room for all its tiles, at times for one
    more, and needs no sum over the sequences before.
    """
    first = tl.full((), 0, tl.int32)
    behind = first + num_sequences
    while behind - first > 1:
        middle = (first + behind) // 2
        begins_before = load_running(cu_seqlens_qo, middle, tokens) // BLOCK_M + middle <= place
        first = tl.where(begins_before, middle, first)
        behind = tl.where(begins_before, behind, middle)
    return first, place - (load_running(cu_seqlens_qo, first, tokens) // BLOCK_M + first)


@jit
def attend_keys(
    acc: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    q_head: tl.tensor,
    q_rope: tl.tensor,
    scale_log2: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    begin: tl.tensor,
    end: tl.tensor,
    num_keys: tl.tensor,
    limit: tl.tensor,
    stride_k_s: tl.tensor,
    stride_v_s: tl.tensor,
    ROPE: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Add keys `[begin, end)` of a sequence to the online softmax; with MASKED each row sees those below its limit."""
    for start in range(begin, end, BLOCK_N):
        position = start + tl.arange(0, BLOCK_N)
        row = position
        if MASKED:
            # Behind the last key may lie another sequence's NaN, which a probability of 0 would not keep out.
            row = tl.minimum(position, num_keys - 1)
        row64 = row.to(tl.int64)[:, None]
        k = tl.load(keys + row64 * stride_k_s + tl.arange(0, D_HEAD)[None, :])
        scores = dot(q_head, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32))
        if ROPE:
            k_rope = tl.load(keys + row64 * stride_k_s + D_HEAD + tl.arange(0, D_ROPE)[None, :])
            scores = dot(q_rope, tl.trans(k_rope), scores)
        scores *= scale_log2
        if MASKED:
            scores = tl.where(position[None, :] < limit[:, None], scores, float("-inf"))
        p, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum)
        v = tl.load(values + row64 * stride_v_s + tl.arange(0, D_HEAD)[None, :])
        acc = dot(rounded(p, v.dtype), v, acc * rescale[:, None])
    return acc, row_max, row_sum


@jit_for_any_value("num_sequences", "tokens_q", "tokens_kv", "group", "stride_lse_s", "stride_lse_h")
def dense_prefill_kernel(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    cu_seqlens_qo: tl.tensor,
    cu_seqlens_kv: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    scale_log2: tl.tensor,
    num_sequences: tl.tensor,
    tokens_q: tl.tensor,
    tokens_kv: tl.tensor,
    group: tl.tensor,
    stride_q_s: tl.tensor,
    stride_q_h: tl.tensor,
    stride_k_s: tl.tensor,
    stride_k_h: tl.tensor,
    stride_v_s: tl.tensor,
    stride_v_h: tl.tensor,
    stride_out_s: tl.tensor,
    stride_out_h: tl.tensor,
    stride_lse_s: tl.tensor,
    stride_lse_h: tl.tensor,
    ROPE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Grid `(places, h_q)`, the tiles of one head together, since they read the same keys; the last tile of a sequence,
    which sees the most keys of a causal one, first. A place without queries does nothing.
    """
    place = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    sequence, tile = sequence_of(cu_seqlens_qo, place, num_sequences, tokens_q, BLOCK_M)
    begin = load_running(cu_seqlens_qo, sequence, tokens_q)
    num_queries = load_running(cu_seqlens_qo, sequence + 1, tokens_q) - begin
    begin_key = load_running(cu_seqlens_kv, sequence, tokens_kv)
    num_keys = load_running(cu_seqlens_kv, sequence + 1, tokens_kv) - begin_key
    # Running lengths that fall are the caller's mistake, and leave places before the first tile.
    works = (tile >= 0) & (tile * BLOCK_M < num_queries)
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row < tl.where(works, num_queries, 0)
    limit = tl.zeros([BLOCK_M], tl.int32) + num_keys
    visible = num_keys
    seen_by_all = num_keys
    if CAUSAL:
        limit = tl.minimum(limit, num_keys - (num_queries - 1 - row))
        visible = num_keys - tl.maximum(num_queries - tile * BLOCK_M - BLOCK_M, 0)
        seen_by_all = tl.minimum(num_keys - (num_queries - 1 - tile * BLOCK_M), num_keys)
    visible = tl.where(works, visible, 0)
    seen_by_all = tl.where(works, tl.maximum(seen_by_all, 0) // BLOCK_N * BLOCK_N, 0)

    token = (begin + row).to(tl.int64)
    q_rows = q + token * stride_q_s + wide(head) * stride_q_h
    q_head = tl.load(q_rows[:, None] + tl.arange(0, D_HEAD)[None, :], mask=exists[:, None], other=0.0)
    q_rope = q_head
    if ROPE:
        q_rope = tl.load(q_rows[:, None] + D_HEAD + tl.arange(0, D_ROPE)[None, :], mask=exists[:, None], other=0.0)
    keys = k + wide(begin_key) * stride_k_s + wide(head // group) * stride_k_h
    values = v + wide(begin_key) * stride_v_s + wide(head // group) * stride_v_h
    acc = tl.zeros([BLOCK_M, D_HEAD], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc, row_max, row_sum = attend_keys(
        acc,
        row_max,
        row_sum,
        q_head,
        q_rope,
        scale_log2,
        keys,
        values,
        0,
        seen_by_all,
        num_keys,
        limit,
        stride_k_s,
        stride_v_s,
        ROPE,
        False,
        BLOCK_M,
        BLOCK_N,
    )
    acc, row_max, row_sum = attend_keys(
        acc,
        row_max,
        row_sum,
        q_head,
        q_rope,
        scale_log2,
        keys,
        values,
        seen_by_all,
        visible,
        num_keys,
        limit,
        stride_k_s,
        stride_v_s,
        ROPE,
        True,
        BLOCK_M,
        BLOCK_N,
    )
    result = rounded(times(acc, final_factor(row_max, row_sum, row_max, False)), out.dtype.element_ty)
    out_rows = out + token * stride_out_s + wide(head) * stride_out_h
    tl.store(out_rows[:, None] + tl.arange(0, D_HEAD)[None, :], result, mask=exists[:, None])
    lse_rows = lse + token * stride_lse_s + wide(head) * stride_lse_h
    tl.store(lse_rows, lse_base_2(row_max, row_sum, float("inf")) * LN2, mask=exists)


def dense_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    softmax_scale: float,
    causal: bool,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """out `[tokens_q, h_q, 128]` and lse `[tokens_q, h_q]`, natural log, of tensors that were checked.

    Tokens that no sequence has hold 0 and +inf from the start, whatever the running lengths are.
    """
    tokens, h_q, d_qk = q.shape
    out = q.new_zeros((tokens, h_q, HEAD_DIM_V))
    lse = out.new_full((h_q, tokens), float("inf"), dtype=torch.float32).t()
    sequences = cu_seqlens_qo.shape[0] - 1
    if tokens == 0 or sequences == 0 or k.shape[0] == 0:
        return out, lse
    if tile is None:
        classes = tuning.size_class(tokens), tuning.size_class(sequences)
        kind = ("dense_prefill", d_qk, h_q, k.shape[1], causal, *classes)
        inputs = (q, k, v, cu_seqlens_qo, cu_seqlens_kv, softmax_scale, causal)
        tiles = prefill_tiles(Gpu.of(q.device), d_qk)
        tile = tuning.choose(kind, tiles, q.device, lambda tile: dense_prefill(*inputs, tile))
    with device_of(q):
        dense_prefill_kernel[(tokens // tile.block_m + sequences, h_q)](
            q,
            k,
            v,
            cu_seqlens_qo,
            cu_seqlens_kv,
            out,
            lse,
            float(softmax_scale * LOG2E.value),
            sequences,
            tokens,
            k.shape[0],
            h_q // k.shape[1],
            *q.stride()[:2],
            *k.stride()[:2],
            *v.stride()[:2],
            *out.stride()[:2],
            *lse.stride(),
            ROPE=d_qk > HEAD_DIM_V,
            CAUSAL=causal,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            **OPTIONS,
        )
    return out, lse
