"""KV-cache formats in PyTorch: bytes to values, values to bytes, on any device.

Everything is integer arithmetic, or single float32 operations that every device rounds alike, so that a kernel can give
the same bits.
"""

from itertools import pairwise

import torch
from torch import Tensor

from flash_mla import problem_kv_cache
from flash_mla.kv_format import KVFormat, Layout

ROWS_PER_STEP = 1 << 14
"""Rows that are read or written together, to bound memory."""

E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9
E4M3_NAN = 0x7F
E2M1_LARGEST = 6.0
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
SMALLEST_SCALE = 1e-4
"""Of the formats whose values are e4m3."""


# ---- Reading.


def gather_rows(cache: Tensor, kv_format: KVFormat, slots: Tensor) -> Tensor:
    """Rows of a cache as bfloat16.

    Args:
        cache: `[num_blocks, page, 1, d_qk or bytes]`, any strides that the format allows.
        slots: int64, any shape: `page_index * page + offset`, all within the cache.

    Returns:
        bfloat16 `[*slots.shape, d_qk]`: `stored * scale` in float32, rounded once.
    """
    if kv_format is KVFormat.BF16:
        return _take(cache[:, :, 0], slots)
    layout = kv_format.layout
    rows, scales = _byte_views(cache, layout)
    row = _take(rows, slots)
    if layout.scales_behind_page:
        return decode(layout, row, _take(scales, slots))
    return decode(layout, row, row[..., layout.value_bytes : layout.value_bytes + layout.scale_bytes])


def _byte_views(cache: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """uint8 views `[num_blocks, page, bytes]` of the rows and of their scales."""
    raw = cache.view(torch.uint8)
    num_blocks, page = raw.shape[:2]
    if not layout.scales_behind_page:
        rows = raw[:, :, 0]
        return rows, rows[..., layout.value_bytes : layout.value_bytes + layout.scale_bytes]
    start, stride = raw.storage_offset(), raw.stride(0)
    rows = raw.as_strided((num_blocks, page, layout.row_stride), (stride, layout.row_stride, 1), start)
    scales_start = start + layout.scale_offset(page)
    scales = raw.as_strided((num_blocks, page, layout.scale_bytes), (stride, layout.scale_stride, 1), scales_start)
    return rows, scales


def _take(view: Tensor, slots: Tensor) -> Tensor:
    """`view[slots // page, slots % page]` of a `[num_blocks, page, width]` view."""
    num_blocks, page, width = view.shape
    stride = view.stride(0) if page == 1 else view.stride(1)
    if num_blocks > 1 and view.stride(0) != page * stride:
        return view[slots.div(page, rounding_mode="floor"), slots.remainder(page)]
    # Evenly spaced rows: one index per row is several times faster on the CPU.
    rows = view.as_strided((num_blocks * page, width), (stride, view.stride(2)), view.storage_offset())
    return rows.index_select(0, slots.flatten()).view(*slots.shape, width)


def decode(layout: Layout, row: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 `[..., d_qk]` from the bytes of rows `[..., row bytes]` and of their scales `[..., scale bytes]`."""
    stored = row[..., : layout.value_bytes]
    values = _e4m3_values(stored) if layout.element == "e4m3" else _e2m1_values(stored)
    factors = _scale_values(layout, scales)
    decoded = torch.empty((*row.shape[:-1], layout.d_qk), dtype=torch.bfloat16, device=row.device)
    groups = (layout.num_scales, layout.group)
    decoded[..., : layout.quantised] = torch.unflatten(values, -1, groups).mul_(factors[..., None]).flatten(-2)
    if layout.rope > 0:
        rope = row[..., layout.rope_offset : layout.rope_offset + 2 * layout.rope]
        decoded[..., layout.quantised :] = rope.contiguous().view(torch.bfloat16)
    return decoded


def _e4m3_values(codes: Tensor) -> Tensor:
    return codes.view(torch.float8_e4m3fn).float()


def _e2m1_values(pairs: Tensor) -> Tensor:
    values = torch.tensor([*E2M1_VALUES, *(-value for value in E2M1_VALUES)], device=pairs.device)
    pair = torch.stack((values.repeat(16), values.repeat_interleave(16)), dim=-1)
    return pair.index_select(0, pairs.flatten().int()).view(*pairs.shape[:-1], -1)


def _scale_values(layout: Layout, scales: Tensor) -> Tensor:
    """float32 `[..., num_scales]` from the bytes of scales."""
    if layout.scale == "float32":
        return scales.contiguous().view(torch.float32)
    if layout.scale == "e4m3":
        return _e4m3_values(scales)
    exponent = scales.int()
    # 2 ** -127 is no normal number: its bits are not those of an exponent.
    return torch.where(exponent == 0, 1 << 22, exponent << 23).view(torch.float32)


# ---- Writing.


def encode(layout: Layout, kv: Tensor, exact_scale: bool) -> tuple[Tensor, Tensor]:
    """The bytes of rows `[tokens, d_qk]`: of the quantised values `[tokens, value_bytes]` and of their scales
    `[tokens, scale_bytes]`.

    The scale of a group is made from the largest finite magnitude in it. Infinities become the largest value that can
    be stored, and NaN stays NaN (in a format of e2m1, which has none, for its whole group).
    """
    groups = torch.unflatten(kv[:, : layout.quantised].float(), -1, (layout.num_scales, layout.group))
    largest = torch.where(groups.isfinite(), groups.abs(), 0.0).amax(-1)
    if layout.element == "e2m1":
        scales = _to_e4m3(_divided(largest, E2M1_LARGEST).clamp_(min=E4M3_SMALLEST))
        codes = _to_e2m1(groups / _e4m3_values(scales)[..., None]).flatten(-2)
        scales = torch.where(groups.isnan().any(-1), E4M3_NAN, scales).to(torch.uint8)
        return codes[:, 0::2] | (codes[:, 1::2] << 4), scales
    scale = _divided(largest, E4M3_LARGEST).clamp_(min=SMALLEST_SCALE)
    if not exact_scale:
        scale = (_exponent_above(scale) << 23).view(torch.float32)
    codes = _to_e4m3(groups / scale[..., None]).flatten(-2)
    if layout.scale == "ue8m0":
        return codes, _exponent_above(scale).to(torch.uint8)
    return codes, scale.view(torch.uint8)


def _divided(values: Tensor, divisor: float) -> Tensor:
    """The quotient, rounded once. (CUDA multiplies by the reciprocal where the divisor is a number on the host.)"""
    return values / torch.full_like(values, divisor)


def _exponent_above(value: Tensor) -> Tensor:
    """`127 + ceil(log2(value))` as int32, for positive normal float32, from the bits."""
    bits = value.view(torch.int32)
    return (bits >> 23) + ((bits & 0x7FFFFF) != 0).int()


def _to_e4m3(values: Tensor) -> Tensor:
    """uint8 codes: nearest, ties to even, too large to the largest; NaN to 0x7F."""
    codes = values.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)
    return torch.where(values.isnan(), E4M3_NAN, codes).to(torch.uint8)


def _to_e2m1(values: Tensor) -> Tensor:
    """uint8 codes 0 to 15: nearest, ties to the even code, too large to the largest; NaN to 7."""
    magnitude = values.abs()
    code = torch.zeros_like(values, dtype=torch.uint8)
    for index, (low, high) in enumerate(pairwise(E2M1_VALUES)):
        middle = (low + high) / 2
        above = magnitude > middle if index % 2 == 0 else magnitude >= middle
        code += above.to(torch.uint8)
    sign = torch.where(values.signbit(), 8, 0).to(torch.uint8)
    return torch.where(values.isnan(), 7, code | sign).to(torch.uint8)


# ---- The operators.


@torch.no_grad()
def append_kv_cache(kv: Tensor, cache: Tensor, slot_mapping: Tensor, kv_format: str, exact_scale: bool) -> None:
    """`torch.ops.flash_mla.reference_append_kv_cache`. Slots outside the cache are skipped."""
    problem_kv_cache.check_append(kv, cache, slot_mapping, kv_format, exact_scale)
    known = KVFormat(kv_format)
    num_blocks, page = cache.shape[:2]
    slots = slot_mapping.to(torch.int64)
    for rows, targets in zip(torch.split(kv, ROWS_PER_STEP), torch.split(slots, ROWS_PER_STEP), strict=True):
        wanted = (targets >= 0) & (targets < num_blocks * page)
        targets = targets[wanted]
        where = (targets.div(page, rounding_mode="floor"), targets.remainder(page))
        _write(rows[wanted], cache, where, known, exact_scale)


def _write(kv: Tensor, cache: Tensor, where: tuple[Tensor, Tensor], kv_format: KVFormat, exact_scale: bool) -> None:
    if kv_format is KVFormat.BF16:
        cache[:, :, 0].index_put_(where, kv)
        return
    layout = kv_format.layout
    rows, scale_rows = _byte_views(cache, layout)
    values, scales = encode(layout, kv, exact_scale)
    rope = kv[:, layout.quantised :].contiguous().view(torch.uint8)
    if layout.scales_behind_page:
        rows.index_put_(where, torch.cat((values, rope), 1))
        scale_rows.index_put_(where, scales)
        pads = scale_rows.as_strided(
            (*scale_rows.shape[:2], layout.scale_stride - layout.scale_bytes),
            scale_rows.stride(),
            scale_rows.storage_offset() + layout.scale_bytes,
        )
        pads.index_put_(where, torch.zeros((), dtype=torch.uint8, device=kv.device))
    else:
        rows.index_put_(where, torch.cat((values, scales, rope), 1))


@torch.no_grad()
def dequantize_kv_cache(cache: Tensor, kv_format: str) -> Tensor:
    """`torch.ops.flash_mla.reference_dequantize_kv_cache`."""
    problem_kv_cache.check_dequantize(cache, kv_format)
    known = KVFormat(kv_format)
    num_blocks, page = cache.shape[:2]
    d_qk = known.d_qk_of(cache)
    values = torch.empty((num_blocks * page, d_qk), dtype=torch.bfloat16, device=cache.device)
    for start in range(0, num_blocks * page, ROWS_PER_STEP):
        end = min(start + ROWS_PER_STEP, num_blocks * page)
        values[start:end] = gather_rows(cache, known, torch.arange(start, end, device=cache.device))
    return values.view(num_blocks, page, 1, d_qk)
