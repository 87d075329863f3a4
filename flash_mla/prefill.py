"""Prefill attention: sparse over selected rows, and dense over variable-length sequences. Not built yet."""

from typing import Literal

from torch import Tensor

from flash_mla.errors import not_built_yet
from flash_mla.kv_cache import KVFormat


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of each query over its own selected rows.

    Args:
        q: bfloat16 `[s_q, h_q, d_qk]`.
        kv: bfloat16 `[s_kv, h_kv = 1, d_qk]`, any row stride.
        indices: int32 `[s_q, h_kv, topk]`.
        sm_scale: factor on the scores.
        d_v: V is the first `d_v` values of a row.
        attn_sink: float32 `[h_q]`, natural-log units.
        topk_length: int32 `[s_q]`.
        out: where to write out.
        return_lse_base: base of the logarithm of lse.
        kv_format: format of an FP8 `kv`.

    Returns:
        out bfloat16 `[s_q, h_q, d_v]`, max_logits float32 `[s_q, h_q]` and lse float32 `[s_q, h_q]`, after the scale.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("flash_mla_sparse_fwd")


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

    Args:
        q: `[tokens_q, h_q, d_qk]`, d_qk 192 or 128.
        k: `[tokens_kv, h_kv, d_qk]`.
        v: `[tokens_kv, h_kv, 128]`.
        cu_seqlens_qo: int32 `[sequences + 1]`, running token counts of q.
        cu_seqlens_kv: int32 `[sequences + 1]`, running token counts of k and v.
        max_seqlen_qo: longest sequence of q.
        max_seqlen_kv: longest sequence of k.
        dropout_p: 0.
        softmax_scale: factor on the scores; None stands for `d_qk ** -0.5`.
        causal: mask aligned to the bottom right.
        deterministic: gradients with the same bits on every run.
        is_varlen: whether the sequences differ in length.

    Returns:
        out `[tokens_q, h_q, 128]` and lse float32 `[tokens_q, h_q]`, natural log.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("flash_attn_varlen_func")


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
        head_dim_qk: where q ends and k begins.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as in `flash_attn_varlen_func`.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("flash_attn_varlen_qkvpacked_func")


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
        head_dim_qk: where k ends and v begins.
        dropout_p, softmax_scale, causal, deterministic, is_varlen: as in `flash_attn_varlen_func`.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("flash_attn_varlen_kvpacked_func")
