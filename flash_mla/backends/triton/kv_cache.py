"""KV-cache formats in Triton: rows of bfloat16 into slots of a cache, quantised, and all slots of a cache back.

The bits are the reference's: integer arithmetic, or single float32 operations that are rounded once.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton.config import Gpu, converts_fp8, interpreting
from flash_mla.backends.triton.dequant import (
    MODEL1,
    MODEL1_NOPE,
    V32,
    V32_NO_ROPE,
    V41_FP4,
    Format,
    e4m3_to_float32,
    load_tokens,
    pages_of,
    token_bytes,
)
from flash_mla.backends.triton.language import D_ROPE, D_V, jit, jit_for_any_value, wide, widened
from flash_mla.backends.triton.launch import OPTIONS, device_of
from flash_mla.kv_format import KVFormat

ROWS = 4
"""Rows of one program: a warp for each."""

INTERPRETED_ROWS = 64
"""The same under the interpreter, where each program costs milliseconds."""

E4M3_NAN = tl.constexpr(0x7F)


# ---- Quantising.


@jit
def exponent_above(value: tl.tensor) -> Any:
    """`127 + ceil(log2(value))` (uint32) for positive normal float32, from the bits."""
    bits = value.to(tl.uint32, bitcast=True)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.uint32)


@jit
def to_e4m3(value: tl.tensor) -> Any:
    """e4m3 codes (uint32) of float32 values: nearest, ties to even, too large to the largest; NaN to 0x7F."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = tl.minimum(tl.abs(value), 448.0)
    rounding = magnitude.to(tl.uint32, bitcast=True)
    # Normal numbers: 20 bits of the fraction go, and the exponent's bias falls from 127 to 7.
    normal = ((rounding + 0x7FFFF + ((rounding >> 20) & 1)) >> 20) - (120 << 3)
    # Subnormal numbers: multiples of 2^-9, which is the last place of float32 numbers from 2^14 on.
    subnormal = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0.015625, subnormal, normal) | ((bits >> 24) & 0x80)
    return tl.where(value == value, code, E4M3_NAN)


@jit
def to_e2m1(value: tl.tensor) -> Any:
    """e2m1 codes (uint32) of float32 values: nearest, ties to the even code, too large to the largest; NaN to 7."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = tl.abs(value)
    code = (magnitude > 0.25).to(tl.uint32) + (magnitude >= 0.75).to(tl.uint32) + (magnitude > 1.25).to(tl.uint32)
    code += (magnitude >= 1.75).to(tl.uint32) + (magnitude > 2.5).to(tl.uint32) + (magnitude >= 3.5).to(tl.uint32)
    code += (magnitude > 5.0).to(tl.uint32)
    return tl.where(value == value, code | ((bits >> 28) & 8), 7)


@jit
def largest_finite(groups: tl.tensor) -> Any:
    """`[ROWS, GROUPS]`: the largest finite magnitude of float32 groups `[ROWS, GROUPS, values]`."""
    magnitude = tl.abs(groups)
    return tl.max(tl.where(magnitude < float("inf"), magnitude, 0.0), 2)


@jit
def e4m3_groups(groups: tl.tensor, EXACT: tl.constexpr) -> Any:
    """The codes of float32 groups `[ROWS, GROUPS, values]`, and their scales `[ROWS, GROUPS]`: with EXACT as they are,
    else powers of two.
    """
    scale = largest_finite(groups)
    scale = tl.maximum(tl.div_rn(scale, tl.full(scale.shape, 448.0, tl.float32)), 1e-4)
    if EXACT:
        codes = to_e4m3(tl.div_rn(groups, tl.broadcast_to(scale[:, :, None], groups.shape)))
    else:
        exponent = exponent_above(scale)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        codes = to_e4m3(groups * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, :, None])
    return codes, scale


@jit
def e2m1_groups(groups: tl.tensor) -> Any:
    """The codes of float32 groups `[ROWS, GROUPS, values]`, and the e4m3 codes of their scales `[ROWS, GROUPS]`."""
    scale = largest_finite(groups)
    scale = tl.maximum(tl.div_rn(scale, tl.full(scale.shape, 6.0, tl.float32)), 0.001953125)
    stored = to_e4m3(scale)
    scale = e4m3_to_float32(stored.to(tl.uint8), False)
    codes = to_e2m1(tl.div_rn(groups, tl.broadcast_to(scale[:, :, None], groups.shape)))
    has_nan = tl.max((groups != groups).to(tl.int32), 2) > 0
    return codes, tl.where(has_nan, E4M3_NAN, stored)


# ---- The kernels.


@jit
def slots_of(
    slot_mapping: tl.tensor, row: tl.tensor, exists: tl.tensor, stride: tl.tensor, num_slots: tl.tensor
) -> Any:
    """Slots of rows, and whether they are slots of the cache; 0 for those that are not."""
    slot = tl.load(slot_mapping + row * stride, mask=exists, other=-1).to(tl.int64)
    taken = (slot >= 0) & (slot < num_slots)
    return tl.where(taken, slot, 0), taken


@jit_for_any_value("tokens", "num_slots", "stride_slot")
def append_kernel(
    kv: tl.tensor,
    cache: tl.tensor,
    slot_mapping: tl.tensor,
    tokens: tl.tensor,
    num_slots: tl.tensor,
    stride_kv: tl.tensor,
    stride_slot: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUPS: tl.constexpr,
    EXACT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Grid `(tokens / ROWS,)`. `cache` points to bytes; GROUPS share 512 values (MODEL1 does not quantise the last)."""
    row = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    slot, taken = slots_of(slot_mapping, row, row < tokens, stride_slot, num_slots)
    first = cache + (slot // PAGE) * stride_page
    values, scales = token_bytes(first, (slot % PAGE).to(tl.int32), stride_token, PAGE, FORMAT)
    column = tl.arange(0, D_V)[None, :]
    group = tl.arange(0, GROUPS)[None, :]
    rope_column = tl.arange(0, D_ROPE)[None, :]
    from_row = kv + row[:, None] * stride_kv
    x = widened(tl.load(from_row + column, mask=taken[:, None], other=0.0))
    groups = tl.reshape(x, [ROWS, GROUPS, D_V // GROUPS])
    if FORMAT == V41_FP4:
        codes, stored = e2m1_groups(groups)
        low, high = tl.split(tl.reshape(codes, [ROWS, D_V // 2, 2]))
        pair_column = tl.arange(0, D_V // 2)[None, :]
        tl.store(values[:, None] + pair_column, (low | (high << 4)).to(tl.uint8), mask=taken[:, None])
        tl.store(values[:, None] + D_V // 2 + group, stored.to(tl.uint8), mask=taken[:, None])
    else:
        codes, scale = e4m3_groups(groups, EXACT)
        quantised = taken[:, None] & (column < (MODEL1_NOPE if FORMAT == MODEL1 else D_V))
        tl.store(values[:, None] + column, tl.reshape(codes, [ROWS, D_V]).to(tl.uint8), mask=quantised)
        if FORMAT <= V32_NO_ROPE:
            at = (values + D_V).to(tl.pointer_type(tl.float32))
            tl.store(at[:, None] + group, scale, mask=taken[:, None])
        else:
            stored = scale.to(tl.uint32, bitcast=True) >> 23
            if FORMAT == MODEL1:
                stored = tl.where(group == 7, 0, stored)  # a byte of padding
            else:
                scales += D_V
            tl.store(scales[:, None] + group, stored.to(tl.uint8), mask=taken[:, None])
        if FORMAT == V32:
            rope = tl.load(from_row + D_V + rope_column, mask=taken[:, None], other=0.0)
            at = (values + D_V + 16).to(tl.pointer_type(tl.bfloat16))
            tl.store(at[:, None] + rope_column, rope, mask=taken[:, None])
        elif FORMAT == MODEL1:
            rope = tl.load(from_row + MODEL1_NOPE + rope_column, mask=taken[:, None], other=0.0)
            at = (values + MODEL1_NOPE).to(tl.pointer_type(tl.bfloat16))
            tl.store(at[:, None] + rope_column, rope, mask=taken[:, None])


@jit_for_any_value("tokens", "num_slots", "stride_slot")
def append_rows_kernel(
    kv: tl.tensor,
    cache: tl.tensor,
    slot_mapping: tl.tensor,
    tokens: tl.tensor,
    num_slots: tl.tensor,
    stride_kv: tl.tensor,
    stride_slot: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """`append_kernel` for rows that are not quantised, of any length D."""
    row = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    slot, taken = slots_of(slot_mapping, row, row < tokens, stride_slot, num_slots)
    column = tl.arange(0, COLUMNS)[None, :]
    copied = taken[:, None] & (column < D)
    x = tl.load(kv + row[:, None] * stride_kv + column, mask=copied, other=0.0)
    at = cache + (slot // PAGE) * stride_page + (slot % PAGE) * stride_token
    tl.store(at[:, None] + column, x, mask=copied)


@jit_for_any_value("num_slots")
def dequantize_kernel(
    cache: tl.tensor,
    values: tl.tensor,
    num_slots: tl.tensor,
    stride_page: tl.tensor,
    stride_token: tl.tensor,
    PAGE: tl.constexpr,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Grid `(slots / ROWS,)`. `cache` points to bytes; `values` `[slots, d_qk]` is contiguous."""
    slot = wide(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    exists = slot < num_slots
    first = cache + (slot // PAGE) * stride_page
    k, k_rope = load_tokens(first, (slot % PAGE).to(tl.int32), exists, stride_token, PAGE, FORMAT, HARDWARE, ROWS, True)
    d_qk: tl.constexpr = D_V + D_ROPE if FORMAT == V32 else D_V
    at = values + slot[:, None] * d_qk
    tl.store(at + tl.arange(0, D_V)[None, :], k, mask=exists[:, None])
    if FORMAT == V32:
        tl.store(at + D_V + tl.arange(0, D_ROPE)[None, :], k_rope, mask=exists[:, None])


# ---- The launches.


def append_kv_cache(kv: Tensor, cache: Tensor, slot_mapping: Tensor, known: KVFormat, exact_scale: bool) -> None:
    """Write rows into slots. What is no slot of the cache is skipped."""
    tokens, d_qk = kv.shape
    if tokens == 0:
        return
    rows = INTERPRETED_ROWS if interpreting() else ROWS
    format = None if known is KVFormat.BF16 else Format[known.value]
    page, *strides = pages_of(cache, format)
    sizes = (tokens, cache.shape[0] * cache.shape[1], kv.stride(0), slot_mapping.stride(0), *strides)
    with device_of(kv):
        if format is None:
            append_rows_kernel[(-(-tokens // rows),)](
                kv,
                cache,
                slot_mapping,
                *sizes,
                PAGE=page,
                D=d_qk,
                COLUMNS=1 << (d_qk - 1).bit_length(),
                ROWS=rows,
                num_warps=ROWS,
                **OPTIONS,
            )
            return
        append_kernel[(-(-tokens // rows),)](
            kv,
            cache.view(torch.uint8),
            slot_mapping,
            *sizes,
            PAGE=page,
            FORMAT=int(format),
            GROUPS=512 // known.layout.group,
            EXACT=exact_scale,
            ROWS=rows,
            num_warps=ROWS,
            **OPTIONS,
        )


def dequantize_kv_cache(cache: Tensor, known: KVFormat) -> Tensor:
    """All slots of a cache as bfloat16 `[num_blocks, page, 1, d_qk]`."""
    if known is KVFormat.BF16:
        return cache.clone(memory_format=torch.contiguous_format)
    num_blocks, page = cache.shape[:2]
    rows = INTERPRETED_ROWS if interpreting() else ROWS
    values = cache.new_empty((num_blocks, page, 1, known.d_qk_of(cache)), dtype=torch.bfloat16)
    spaced, *strides = pages_of(cache, Format[known.value])
    with device_of(cache):
        dequantize_kernel[(-(-num_blocks * page // rows),)](
            cache.view(torch.uint8),
            values,
            num_blocks * page,
            *strides,
            PAGE=spaced,
            FORMAT=int(Format[known.value]),
            HARDWARE=converts_fp8(Gpu.of(cache.device)),
            ROWS=rows,
            num_warps=ROWS,
            **OPTIONS,
        )
    return values
