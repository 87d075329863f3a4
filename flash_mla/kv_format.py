"""The byte layout of every KV-cache format, once.

A row of a cache holds, in this order, the quantised values, the scales of groups of them, and values that are not
quantised (RoPE); MODEL1 alone keeps the scales of a page behind all its rows. A value is `stored * scale`, computed in
float32 and rounded once, to bfloat16.
"""

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import torch
from torch import Tensor

from flash_mla import arguments
from flash_mla.errors import wanted

BYTE_DTYPES = (torch.float8_e4m3fn, torch.int8, torch.uint8)
"""What a cache of bytes may be declared as."""

ROW_ALIGNMENT = 16
"""Bytes that the strides of a cache of bytes must be multiples of: kernels load so many at once."""

PAGE_ALIGNMENT = 576
"""Engines pad the pages of MODEL1 to multiples of so many bytes."""


@dataclass(frozen=True)
class Layout:
    """Where the bytes of a row are. Offsets within a page of `page` rows."""

    d_qk: int
    element: Literal["e4m3", "e2m1"]
    """Of the quantised values. A byte of e2m1 holds two values, the one of even index in the low nibble."""
    quantised: int
    """Number of quantised values, which come first."""
    group: int
    """Quantised values per scale."""
    scale: Literal["float32", "ue8m0", "e4m3"]
    """ue8m0 byte e means `2 ** (e - 127)`."""
    bytes_per_token: int
    scales_behind_page: bool = False
    """Whether the scales stand behind the rows of the page, and so many values of RoPE right after the quantised."""

    @property
    def value_bytes(self) -> int:
        """Bytes of the quantised values of a row."""
        return self.quantised if self.element == "e4m3" else self.quantised // 2

    @property
    def rope(self) -> int:
        """Number of bfloat16 values at the end of the row."""
        return self.d_qk - self.quantised

    @property
    def num_scales(self) -> int:
        """Scales of a row."""
        return self.quantised // self.group

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales of a row, without padding."""
        return self.num_scales * (4 if self.scale == "float32" else 1)

    @property
    def row_stride(self) -> int:
        """Bytes from the values of one row to those of the next."""
        return self.value_bytes + 2 * self.rope if self.scales_behind_page else self.bytes_per_token

    @property
    def rope_offset(self) -> int:
        """From the first byte of a row to its RoPE values."""
        return self.value_bytes + (0 if self.scales_behind_page else self.scale_bytes)

    @property
    def scale_stride(self) -> int:
        """Bytes from the scales of one row to those of the next."""
        return self.bytes_per_token - self.row_stride if self.scales_behind_page else self.bytes_per_token

    def scale_offset(self, page: int) -> int:
        """From the first byte of a page to the scales of its first row."""
        return self.row_stride * page if self.scales_behind_page else self.value_bytes

    def page_stride(self, page: int) -> int:
        """Bytes from one page to the next, as `quantize_kv_cache` lays them out and engines do."""
        used = self.bytes_per_token * page
        return -(-used // PAGE_ALIGNMENT) * PAGE_ALIGNMENT if self.scales_behind_page else used


class KVFormat(str, Enum):
    """Formats of a KV cache. The cache of a byte format is declared `[num_blocks, page, 1, bytes per token]`."""

    V32 = "V32"
    """d_qk 576, 656 bytes: 512 e4m3, 4 float32 scales (one per 128 values), 64 bf16 RoPE values."""
    V32_NO_ROPE = "V32_NO_ROPE"
    """d_qk 512, 528 bytes: 512 e4m3, 4 float32 scales."""
    MODEL1 = "MODEL1"
    """d_qk 512, 584 bytes, split within each page of P rows: for row t at `576 * t` 448 e4m3, then 64 bf16 RoPE values;
    at `576 * P + 8 * t` 7 ue8m0 scales (one per 64 values) and a pad byte. The stride of a page is padded to a multiple
    of 576."""
    V4 = MODEL1
    """Another name of MODEL1."""
    V41 = "V41"
    """d_qk 512, 528 bytes: 512 e4m3, 16 ue8m0 scales (one per 32 values)."""
    V41_FP4 = "V41_FP4"
    """d_qk 512, 288 bytes: 512 e2m1, 32 e4m3 scales (one per 16 values); extra cache only, beside V41."""
    BF16 = "BF16"
    """No quantisation: `[num_blocks, page, 1, d_qk]` bfloat16."""

    @classmethod
    def _missing_(cls, value: object) -> "KVFormat | None":
        return cls.MODEL1 if value == "V4" else None

    @property
    def layout(self) -> Layout:
        """Where the bytes are. Not for BF16, which is no format of bytes."""
        return _LAYOUTS[self]

    def d_qk_of(self, cache: Tensor) -> int:
        """Values per row of a cache of this format."""
        return cache.shape[-1] if self is KVFormat.BF16 else self.layout.d_qk


_LAYOUTS = {
    KVFormat.V32: Layout(576, "e4m3", 512, 128, "float32", 656),
    KVFormat.V32_NO_ROPE: Layout(512, "e4m3", 512, 128, "float32", 528),
    KVFormat.MODEL1: Layout(512, "e4m3", 448, 64, "ue8m0", 584, scales_behind_page=True),
    KVFormat.V41: Layout(512, "e4m3", 512, 32, "ue8m0", 528),
    KVFormat.V41_FP4: Layout(512, "e2m1", 512, 16, "e4m3", 288),
}

# 528 bytes mean V41 where nobody says V32_NO_ROPE.
_BY_SIZE = {
    (576, 656): KVFormat.V32,
    (512, 584): KVFormat.MODEL1,
    (512, 528): KVFormat.V41,
    (512, 288): KVFormat.V41_FP4,
}


def parse(value: object, name: str = "kv_format") -> KVFormat:
    """The format that a caller named.

    Raises:
        ValueError: no format has this name.
        TypeError: neither a format nor a text.
    """
    if not isinstance(value, str):
        raise TypeError(wanted(name, "a KVFormat or its name", type(value).__name__))
    try:
        return KVFormat(value)
    except ValueError:
        raise ValueError(wanted(name, " or ".join(KVFormat.__members__), repr(value))) from None


def resolve(name: str, cache: Any, d_qk: int, kv_format: KVFormat | str | None = None) -> KVFormat:
    """The format of a cache: the one that was named, else what its dtype and bytes per token say.

    Args:
        name: of the argument, for errors.
        cache: `[num_blocks, page, 1, bytes per token]` of a byte dtype, or bfloat16 `[num_blocks, page, 1, d_qk]`.
        d_qk: of the query.
        kv_format: the format that the caller named.

    Raises:
        ValueError, TypeError: the cache is of no format, or not of the one that was named.
    """
    arguments.check_tensor(name, cache, 4, "[num_blocks, page_block_size, h_kv, d_qk or bytes per token]")
    named = None if kv_format is None else parse(kv_format)
    if named is KVFormat.BF16 or (named is None and cache.dtype == torch.bfloat16):
        arguments.check_dtype(name, cache, (torch.bfloat16,))
        return KVFormat.BF16
    arguments.check_dtype(name, cache, (torch.bfloat16, *BYTE_DTYPES) if named is None else BYTE_DTYPES)
    given = int(cache.shape[-1])
    if named is not None:
        if named.layout.d_qk != d_qk:
            raise ValueError(
                wanted("kv_format", f"a format of d_qk = {d_qk}, like q", f"{named.value} of {named.layout.d_qk}")
            )
        check_row_bytes(name, cache, named)
        return named
    if (d_qk, given) not in _BY_SIZE:
        sizes = [f"{size} ({found.value})" for (d, size), found in _BY_SIZE.items() if d == d_qk]
        if not sizes:
            raise ValueError(wanted("q", "d_qk (last dimension) 576 or 512", d_qk))
        raise ValueError(wanted(name, f"{' or '.join(sizes)} bytes per token for d_qk = {d_qk}", given))
    return _BY_SIZE[d_qk, given]


def check_row_bytes(name: str, cache: Tensor, kv_format: KVFormat) -> None:
    """Check the last dimension of a cache of a byte format."""
    size = kv_format.layout.bytes_per_token
    if cache.shape[-1] != size:
        raise ValueError(wanted(name, f"{size} bytes per token ({kv_format.value})", cache.shape[-1]))


def check_cache(name: str, cache: Any, kv_format: KVFormat, d_qk: int | None = None) -> None:
    """Check a cache of `kv_format`: dimensions, dtype, row size and strides.

    Args:
        name: of the argument, for errors.
        cache: `[num_blocks, page, 1, bytes per token]` of a byte dtype, or bfloat16 `[num_blocks, page, 1, d_qk]`.
        kv_format: what it should be.
        d_qk: what the rows of a BF16 cache should hold.

    Raises:
        ValueError, TypeError: naming the argument.
    """
    arguments.check_tensor(name, cache, 4, "[num_blocks, page_block_size, 1, d_qk or bytes per token]")
    num_blocks, page, h_kv, _ = cache.shape
    if num_blocks < 1 or page < 1:
        raise ValueError(wanted(name, "num_blocks and page_block_size of at least 1", f"shape {list(cache.shape)}"))
    if h_kv != 1:
        raise ValueError(wanted(name, "one KV head (h_kv = 1)", h_kv))
    arguments.check_last_stride(name, cache)
    if kv_format is KVFormat.BF16:
        arguments.check_dtype(name, cache, (torch.bfloat16,))
        if d_qk is not None and cache.shape[-1] != d_qk:
            raise ValueError(wanted(name, f"a last dimension of d_qk = {d_qk}, like q", cache.shape[-1]))
        return
    arguments.check_dtype(name, cache, BYTE_DTYPES)
    check_row_bytes(name, cache, kv_format)
    _check_byte_strides(name, cache, kv_format.layout)


def _check_byte_strides(name: str, cache: Tensor, layout: Layout) -> None:
    num_blocks, page = cache.shape[:2]
    if layout.scales_behind_page:
        if page > 1 and cache.stride(1) != layout.bytes_per_token:
            meaning = f"stride(1) = {layout.bytes_per_token} (the rows of a page stand together)"
            raise ValueError(wanted(name, meaning, cache.stride(1)))
    elif page > 1 and cache.stride(1) % ROW_ALIGNMENT != 0:
        raise ValueError(wanted(name, f"stride(1) that is a multiple of {ROW_ALIGNMENT} bytes", cache.stride(1)))
    if num_blocks > 1 and cache.stride(0) % ROW_ALIGNMENT != 0:
        raise ValueError(wanted(name, f"stride(0) that is a multiple of {ROW_ALIGNMENT} bytes", cache.stride(0)))
