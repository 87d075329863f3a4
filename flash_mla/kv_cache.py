"""Quantised KV-cache formats, and writing and reading them. The functions are not built yet."""

from enum import Enum

from torch import Tensor

from flash_mla.errors import not_built_yet


class KVFormat(str, Enum):
    """Byte layouts of an FP8 or FP4 cache row."""

    V32 = "V32"
    """d_qk 576, 656 bytes: 512 e4m3, 4 float32 scales (one per 128 values), 64 bf16 RoPE values."""
    V32_NO_ROPE = "V32_NO_ROPE"
    """d_qk 512, 528 bytes: 512 e4m3, 4 float32 scales."""
    MODEL1 = "MODEL1"
    """d_qk 512, 584 bytes, split within each page: 448 e4m3 and 64 bf16 RoPE values; 7 ue8m0 scales and a pad byte."""
    V4 = MODEL1
    """Another name of MODEL1."""
    V41 = "V41"
    """d_qk 512, 528 bytes: 512 e4m3, 16 ue8m0 scales (one per 32 values)."""
    V41_FP4 = "V41_FP4"
    """d_qk 512, 288 bytes: 512 e2m1, 32 e4m3 scales (one per 16 values); extra cache only."""


def quantize_kv_cache(kv: Tensor, format: KVFormat | str, page: int) -> Tensor:
    """Write bfloat16 rows `[tokens, d_qk]` into a new paged cache `[num_blocks, page, 1, bytes]` of `format`.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("quantize_kv_cache")


def dequantize_kv_cache(cache: Tensor, format: KVFormat | str) -> Tensor:
    """Read a paged cache of `format` back as bfloat16 `[num_blocks, page, 1, d_qk]`.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("dequantize_kv_cache")


def append_kv_cache(kv: Tensor, cache: Tensor, slot_mapping: Tensor, format: KVFormat | str) -> None:
    """Write bfloat16 rows `[tokens, d_qk]` into the slots `slot_mapping` `[tokens]` of a cache of `format`; slot -1
    is skipped.

    Raises:
        UnsupportedError: always; not built yet.
    """
    raise not_built_yet("append_kv_cache")
