"""The checks of `append_kv_cache`, `quantize_kv_cache` and `dequantize_kv_cache`."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flash_mla import arguments, kv_format, problem
from flash_mla.errors import wanted
from flash_mla.kv_format import KVFormat

SLOT_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class KVCacheProblem:
    """What the choice of a kernel that writes or reads a cache depends on."""

    op: ClassVar[str] = "kv_cache"

    device_type: str
    compute_capability: int | None
    kv_format: KVFormat
    page_block_size: int

    @staticmethod
    def of(cache: Tensor, format: KVFormat | str) -> "KVCacheProblem":
        """The problem of an `append_kv_cache` or `dequantize_kv_cache` call on `cache`."""
        return KVCacheProblem(*problem.device_of(cache), kv_format.parse(format, "format"), cache.shape[1])


def check_rows(kv: Any, known: KVFormat, d_qk: int | None = None) -> None:
    """Check bfloat16 rows for a cache of a format (of `d_qk` values, where the format leaves them open)."""
    arguments.check_tensor("kv", kv, 2, "[tokens, d_qk]")
    arguments.check_dtype("kv", kv, (torch.bfloat16,))
    values = d_qk if known is KVFormat.BF16 else known.layout.d_qk
    if values is not None and kv.shape[1] != values:
        raise ValueError(wanted("kv", f"d_qk = {values} values per row ({known.value})", kv.shape[1]))
    arguments.check_last_stride("kv", kv)


def check_append(kv: Any, cache: Any, slot_mapping: Any, format: Any, exact_scale: Any) -> None:
    """Check the arguments of `torch.ops.flash_mla.append_kv_cache`."""
    known = kv_format.parse(format, "format")
    kv_format.check_cache("cache", cache, known)
    check_rows(kv, known, cache.shape[-1])
    arguments.check_device("cache", cache, kv.device, like="kv")
    arguments.check_tensor("slot_mapping", slot_mapping, 1, "[tokens]")
    arguments.check_dtype("slot_mapping", slot_mapping, SLOT_DTYPES)
    arguments.check_shape("slot_mapping", slot_mapping, "[tokens]", (kv.shape[0],))
    arguments.check_device("slot_mapping", slot_mapping, kv.device, like="kv")
    check_exact_scale(exact_scale, known)


def check_dequantize(cache: Any, format: Any) -> None:
    """Check the arguments of `torch.ops.flash_mla.dequantize_kv_cache`."""
    kv_format.check_cache("cache", cache, kv_format.parse(format, "format"))


def check_exact_scale(exact_scale: Any, known: KVFormat) -> None:
    """Check that the format has room for a scale that is no power of two."""
    arguments.check_flag("exact_scale", exact_scale)
    if exact_scale and (known is KVFormat.BF16 or known.layout.scale != "float32"):
        raise ValueError(wanted("exact_scale", f"False for {known.value} (it has no float32 scales)", True))
