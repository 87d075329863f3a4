"""What every launch of a kernel shares."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every kernel. Said aloud because Triton's default is about to change."""

MAX_GRID_Y = 65535
"""The most programs of a launch's second dimension."""


def device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device the current one: Triton launches there."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)
