"""Prefill attention: sparse over selected rows, and dense over variable-length sequences."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from flash_mla import arguments, backends, problem, problem_prefill, problem_sparse
from flash_mla.errors import wanted
from flash_mla.kv_format import KVFormat
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparsePrefillProblem


def flash_mla_sparse_fwd(
    q: Tensor,
    kv: Tensor,
    indices: Tensor,
    sm_scale: float,
    d_v: int = 512,
    attn_sink: Tensor | None = None,
    topk_length: Tensor | None = None,
    *,
    out: Tensor | None = None,
    return_lse_base: Literal["e", "2"] = "e",
    kv_format: KVFormat | str | None = None,
    extra_k_cache: Tensor | None = None,
    extra_indices_in_kvcache: Tensor | None = None,
    extra_topk_length: Tensor | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over its own selected rows; V is the first `d_v` values of a row.

    With `s_i = sm_scale * q . k_i` over the rows that the indices name, each as often as it is named:
    `max_logits = max_i s_i`, `lse = ln(sum_i exp s_i)`,
    `out = sum_i exp(s_i - lse) v_i * exp(lse) / (exp(lse) + exp(sink))`. A query without a valid index gets out 0,
    max_logits -inf and lse +inf. FP8 caches are read as they are; where more than 32 heads select each row often and a
    bfloat16 copy takes 256 MiB at the most, the CUDA backend makes one for the duration of the call, which is faster.

    out and lse are differentiable in q, in bfloat16 kv and extra_k_cache, and in attn_sink. On Hopper kernels compute
    the gradients where kv is bfloat16 and the only source, and d_v is 512. Their workspace: `4 * d_qk` bytes per row of
    kv (twice the size of kv), `8 * d_qk + 12` where `deterministic`; 16 bytes per query and head. Elsewhere the
    reference computes them, and the forward again.

    Args:
        q: bfloat16 `[s_q, h_q, d_qk]`, last dimension contiguous; d_qk 576 or 512.
        kv: bfloat16 `[s_kv, h_kv = 1, d_qk]`, any row stride (rows may overlap); or a paged cache
            `[num_blocks, page_block_size, 1, d_qk or bytes per token]`, bfloat16 or of a `KVFormat`.
        indices: int32 `[s_q, h_kv, topk]`: a row of kv, or `page_index * page_block_size + offset`. Whatever is no row
            selects nothing, wherever it stands.
        sm_scale: factor on the scores.
        d_v: 1 to d_qk.
        attn_sink: float32 `[h_q]`, natural-log units, not multiplied by the scale; not part of lse.
        topk_length: int32 `[s_q]`: how many leading indices count, cut to 0 .. topk; None for all.
        out: where to write out: shape and dtype of the result, last dimension contiguous. Not with gradients.
        return_lse_base: base of the logarithm of lse; max_logits stays as it is.
        kv_format: format of `kv`; by default what d_qk and the bytes per token say (528 bytes mean V41).
        extra_k_cache: a second source of rows, of the same format (or V41_FP4 beside V41).
        extra_indices_in_kvcache: int32 `[s_q, h_kv, extra_topk]`, indices into it.
        extra_topk_length: int32 `[s_q]`.
        deterministic: gradients with the same bits on every run. Otherwise those of kv are sums in any order.

    Returns:
        out bfloat16 `[s_q, h_q, d_v]`, max_logits float32 `[s_q, h_q]` and lse float32 `[s_q, h_q]`, after the scale.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: valid, but not served by this device or build; lists each candidate and its reason.
    """

    def problem_of(*_: Any) -> SparsePrefillProblem:
        formats = (KVFormat(names[0]), sm_scale)
        return SparsePrefillProblem.of(q, kv, indices, d_v, extra_k_cache, extra_indices_in_kvcache, *formats)

    q_shape = q.shape if isinstance(q, Tensor) else ()
    names = problem_sparse.format_names(
        q_shape, kv, extra_k_cache, kv_format, (), _sparse_formats, q, kv, extra_k_cache, kv_format
    )
    selected = (q, kv, indices, topk_length, extra_k_cache, extra_indices_in_kvcache, extra_topk_length, attn_sink)
    inputs = (*selected, *names, d_v, sm_scale, return_lse_base, deterministic)
    needs_gradient = _needs_gradient(q, kv, extra_k_cache, attn_sink)
    if out is None:
        with _below_autograd(needs_gradient):
            result, max_logits, lse = backends.serve(
                "sparse_prefill", problem_sparse.check_sparse_prefill, problem_of, *inputs
            )
        return result, max_logits, lse
    if needs_gradient:
        raise ValueError(wanted("out", "None where an input requires a gradient", "a tensor"))
    s_q, h_q, _ = q_shape
    max_logits, lse = (torch.empty((s_q, h_q), dtype=torch.float32, device=q.device) for _ in range(2))
    outputs = (out, max_logits, lse)
    backends.serve("sparse_prefill_out", problem_sparse.check_sparse_prefill, problem_of, *inputs, *outputs)
    return outputs


def _sparse_formats(q: Any, kv: Any, extra: Any, kv_format: Any) -> tuple[KVFormat, KVFormat | None]:
    arguments.check_tensor("q", q, 3, "[s_q, h_q, d_qk]")
    _check_rows("kv", kv)
    if extra is not None:
        _check_rows("extra_k_cache", extra)
    caches = (problem_sparse.as_cache(kv), problem_sparse.as_cache(extra))
    return problem_sparse.resolve_formats("kv", *caches, q.shape[-1], kv_format)


def _check_rows(name: str, kv: Any) -> None:
    if not isinstance(kv, Tensor) or kv.dim() not in (3, 4):
        given = f"shape {list(kv.shape)}" if isinstance(kv, Tensor) else type(kv).__name__
        shapes = "[s_kv, h_kv = 1, d_qk] or [num_blocks, page_block_size, 1, d_qk or bytes per token]"
        raise (ValueError if isinstance(kv, Tensor) else TypeError)(wanted(name, f"a tensor {shapes}", given))


def _needs_gradient(*tensors: Any) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and getattr(tensor, "requires_grad", False):
                return True
    return False


def _below_autograd(needs_gradient: bool) -> AbstractContextManager[Any]:
    """For a call: without autograd where nothing requires a gradient, which halves the host time."""
    if needs_gradient or torch.compiler.is_compiling():
        return nullcontext()
    below_autograd: AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return below_autograd


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """Dense attention over sequences laid end to end.

    `lse = ln(sum_i exp(scale * q . k_i))` and `out = sum_i exp(scale * q . k_i - lse) v_i` over the keys of the query's
    sequence; with `causal`, query j of a sequence of s_q queries and s_kv keys sees keys `<= j + s_kv - s_q`. A query
    that sees no key, or that stands in no sequence, gets out 0 and lse +inf, and has no gradients.

    Differentiable in q, k and v. On Hopper and Blackwell kernels compute the gradients. Their workspace: per query
    token and head `4 * d_qk` bytes (twice the size of q) for float32 sums, 4 more for a sum over out, 4 more where
    `deterministic`; 32 bytes per key head for every 128 keys and every sequence. Elsewhere the reference computes them,
    and the forward again.

    Args:
        q: `[tokens_q, h_q, d_qk]`, bfloat16 or float16, last dimension contiguous; d_qk 192 or 128.
        k: `[tokens_kv, h_kv, d_qk]`, dtype of q; `h_q % h_kv == 0`.
        v: `[tokens_kv, h_kv, 128]`, dtype of q.
        cu_seqlens_qo: int32 `[sequences + 1]`, running token counts of q, from 0.
        cu_seqlens_kv: int32 `[sequences + 1]`, running token counts of k and v, from 0. Sequences may be empty.
        max_seqlen_qo: longest sequence of q, or more.
        max_seqlen_kv: longest sequence of k, or more.
        dropout_p: 0.
        softmax_scale: factor on the scores; None stands for `d_qk ** -0.5`.
        causal: mask aligned to the bottom right.
        deterministic: gradients with the same bits on every run. Otherwise those of q are sums in any order.
        is_varlen: whether the sequences differ in length. Makes no difference.

    Returns:
        out `[tokens_q, h_q, 128]` in q's dtype and lse float32 `[tokens_q, h_q]`, natural log, `stride(0) == 1`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: valid, but not served by this device or build; lists each candidate and its reason.
    """
    problem_prefill.check_dropout(dropout_p, is_varlen)
    if softmax_scale is None and isinstance(q, Tensor) and q.dim() > 0:
        softmax_scale = problem.default_softmax_scale(q.shape[-1])
    lengths = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    inputs = (q, k, v, *lengths, softmax_scale, causal, deterministic)

    def problem_of(*_: Any) -> DensePrefillProblem:
        return DensePrefillProblem.of(q, k, v, cu_seqlens_qo, causal, deterministic, softmax_scale)

    with _below_autograd(_needs_gradient(q, k, v)):
        out, lse = backends.serve("dense_prefill", problem_prefill.check_dense_prefill, problem_of, *inputs)
    return out, lse


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` with q, k and v side by side in the last dimension of one tensor.

    Args:
        qkv: `[tokens, heads, 2 * head_dim_qk + 128]`.
        cu_seqlens: int32 `[sequences + 1]`.
        max_seqlen: longest sequence.
        head_dim_qk: where q ends and k begins: 192 or 128.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as in `flash_attn_varlen_func`.

    Returns:
        out and lse, as `flash_attn_varlen_func`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: valid, but not served by this device or build; lists each candidate and its reason.
    """
    problem_prefill.check_packed("qkv", qkv, head_dim_qk, copies=2)
    q, k, v = qkv[..., :head_dim_qk], qkv[..., head_dim_qk : 2 * head_dim_qk], qkv[..., 2 * head_dim_qk :]
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, deterministic, is_varlen)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_qo: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_qo: int,
    max_seqlen_kv: int,
    head_dim_qk: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    deterministic: bool = False,
    is_varlen: bool = True,
) -> tuple[Tensor, Tensor]:
    """`flash_attn_varlen_func` with k and v side by side in the last dimension of one tensor.

    Args:
        q: `[tokens_q, h_q, head_dim_qk]`.
        kv: `[tokens_kv, h_kv, head_dim_qk + 128]`.
        cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv: as in `flash_attn_varlen_func`.
        head_dim_qk: where k ends and v begins: 192 or 128.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as in `flash_attn_varlen_func`.

    Returns:
        out and lse, as `flash_attn_varlen_func`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: valid, but not served by this device or build; lists each candidate and its reason.
    """
    problem_prefill.check_packed("kv", kv, head_dim_qk, copies=1)
    k, v = kv[..., :head_dim_qk], kv[..., head_dim_qk:]
    lengths = (cu_seqlens_qo, cu_seqlens_kv, max_seqlen_qo, max_seqlen_kv)
    return flash_attn_varlen_func(q, k, v, *lengths, dropout_p, softmax_scale, causal, deterministic, is_varlen)
