"""Writing and reading KV caches of every format."""

import torch
from torch import Tensor

from flash_mla import arguments, backends, kv_format, problem_kv_cache
from flash_mla.kv_format import KVFormat

__all__ = ["KVFormat", "append_kv_cache", "dequantize_kv_cache", "quantize_kv_cache"]


def quantize_kv_cache(kv: Tensor, format: KVFormat | str, page: int, *, exact_scale: bool = False) -> Tensor:
    """Write rows into a new paged cache: row t into slot t.

    The scale of a group of values is `2 ** ceil(log2(max(amax / 448, 1e-4)))`, and e4m3(value / scale) is stored, to
    nearest even. amax is the largest finite magnitude of the group; infinities become the largest value that can be
    stored, and NaN stays NaN. V41_FP4 stores e2m1(value / scale) with the scale e4m3(amax / 6), at least 2 ** -9; a NaN
    makes the whole group NaN.

    Args:
        kv: bfloat16 `[tokens, d_qk]`, last dimension contiguous.
        format: of the cache.
        page: rows per page, at least 1.
        exact_scale: use `max(amax / 448, 1e-4)` as it is (V32 and V32_NO_ROPE).

    Returns:
        uint8 `[ceil(tokens / page), page, 1, bytes per token]`, zeros where no row was written, with the page stride of
        the format (MODEL1: a multiple of 576); for BF16, bfloat16 `[..., d_qk]`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
    """
    known = kv_format.parse(format, "format")
    problem_kv_cache.check_rows(kv, known)
    arguments.check_int("page", page, least=1)
    tokens, d_qk = kv.shape
    num_blocks = -(-tokens // page)
    if known is KVFormat.BF16:
        cache = kv.new_zeros((num_blocks, page, 1, d_qk))
    else:
        size, stride = known.layout.bytes_per_token, known.layout.page_stride(page)
        pages = torch.zeros(num_blocks * stride, dtype=torch.uint8, device=kv.device)
        cache = pages.as_strided((num_blocks, page, 1, size), (stride, size, size, 1))
    if tokens > 0:
        append_kv_cache(kv, cache, torch.arange(tokens, device=kv.device), known, exact_scale=exact_scale)
    return cache


def dequantize_kv_cache(cache: Tensor, format: KVFormat | str) -> Tensor:
    """Read all slots of a paged cache: `stored * scale`, computed in float32 and rounded once, to bfloat16.

    Args:
        cache: `[num_blocks, page, 1, bytes per token]`, float8_e4m3fn, int8 or uint8 (bfloat16 `[..., d_qk]` for BF16).
        format: of the cache.

    Returns:
        bfloat16 `[num_blocks, page, 1, d_qk]`.

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: not served by this device or build.
    """
    known = kv_format.parse(format, "format")
    check, problem_of = problem_kv_cache.check_dequantize, problem_kv_cache.KVCacheProblem.of
    values: Tensor = backends.serve("dequantize_kv_cache", check, problem_of, cache, known.value)
    return values


def append_kv_cache(
    kv: Tensor, cache: Tensor, slot_mapping: Tensor, format: KVFormat | str, *, exact_scale: bool = False
) -> None:
    """Write rows into slots of a paged cache, quantised as `quantize_kv_cache` says.

    Args:
        kv: bfloat16 `[tokens, d_qk]`, last dimension contiguous.
        cache: `[num_blocks, page, 1, bytes per token]`, float8_e4m3fn, int8 or uint8 (bfloat16 `[..., d_qk]` for BF16);
            written in place.
        slot_mapping: int32 or int64 `[tokens]`: `page_index * page + offset`, each slot once. -1, and whatever else is
            no slot of the cache, is skipped.
        format: of the cache.
        exact_scale: use `max(amax / 448, 1e-4)` as it is (V32 and V32_NO_ROPE).

    Raises:
        ValueError, TypeError: naming the argument, what was wanted and what came.
        UnsupportedError: not served by this device or build.
    """
    known = kv_format.parse(format, "format")

    def problem_of(kv: Tensor, cache: Tensor, *_: object) -> problem_kv_cache.KVCacheProblem:
        return problem_kv_cache.KVCacheProblem.of(cache, known)

    check = problem_kv_cache.check_append
    backends.serve("append_kv_cache", check, problem_of, kv, cache, slot_mapping, known.value, exact_scale)
