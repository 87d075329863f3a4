"""The vocabulary of argument checks: each names the argument, what was wanted and what came."""

import math
from typing import Any

import torch
from torch import Tensor

from flash_mla.errors import wanted


def check_tensor(name: str, value: object, dims: int, shape: str) -> None:
    """Check for a tensor of `dims` dimensions; `shape` says which."""
    if not isinstance(value, Tensor):
        raise TypeError(wanted(name, f"a tensor {shape}", "None" if value is None else type(value).__name__))
    if value.dim() != dims:
        raise ValueError(wanted(name, f"{dims} dimensions {shape}", f"shape {list(value.shape)}"))


def check_dtype(name: str, value: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Check for one of some dtypes."""
    if value.dtype not in dtypes:
        raise TypeError(wanted(name, " or ".join(str(dtype) for dtype in dtypes), value.dtype))


def check_shape(name: str, value: Tensor, meaning: str, shape: tuple[int, ...]) -> None:
    """Check for one shape; `meaning` names its dimensions."""
    if tuple(value.shape) != shape:
        raise ValueError(wanted(name, f"shape {meaning} = {list(shape)}", list(value.shape)))


def check_device(name: str, value: Tensor, device: torch.device, like: str = "q") -> None:
    """Check for the device of the argument `like`."""
    if value.device != device:
        raise ValueError(wanted(name, f"a tensor on {device}, like {like}", value.device))


def check_last_stride(name: str, value: Tensor) -> None:
    """Check for a contiguous last dimension."""
    if value.shape[-1] > 1 and value.stride(-1) != 1:
        raise ValueError(wanted(name, "a contiguous last dimension (stride 1)", f"stride {value.stride(-1)}"))


def check_contiguous(name: str, value: Tensor) -> None:
    """Check for a contiguous tensor."""
    if not value.is_contiguous():
        raise ValueError(wanted(name, "a contiguous tensor", f"strides {list(value.stride())}"))


def check_int(name: str, value: object, least: int | None = None) -> None:
    """Check for an int, and that it is at least `least`."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(wanted(name, "an int", type(value).__name__))
    if least is not None and value < least:
        raise ValueError(wanted(name, f"at least {least}", value))


def check_flag(name: str, value: object) -> None:
    """Check for a bool."""
    if not isinstance(value, bool):
        raise TypeError(wanted(name, "a bool", type(value).__name__))


def check_scale(value: object, name: str = "softmax_scale") -> None:
    """Check for a finite number."""
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat)):
        raise TypeError(wanted(name, "a finite number", type(value).__name__))
    if isinstance(value, (int, float)) and not math.isfinite(value):
        raise ValueError(wanted(name, "a finite number", value))


def check_one_of(name: str, value: object, values: tuple[object, ...]) -> None:
    """Check for one of some values."""
    if value not in values:
        raise ValueError(wanted(name, " or ".join(map(repr, values)), repr(value)))


def check_sink(attn_sink: Any, h_q: int, device: torch.device) -> None:
    """Check an attention sink, None or float32 `[h_q]`."""
    if attn_sink is None:
        return
    check_tensor("attn_sink", attn_sink, 1, "[h_q]")
    check_dtype("attn_sink", attn_sink, (torch.float32,))
    check_shape("attn_sink", attn_sink, "[h_q]", (h_q,))
    check_device("attn_sink", attn_sink, device)
    check_contiguous("attn_sink", attn_sink)
