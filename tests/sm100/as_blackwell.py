"""Makes Python and an emulated library believe that the GPU is a Blackwell: `import as_blackwell`, or
`PYTHONPATH=.:tests/sm100 pytest -p as_blackwell`.
"""

from __future__ import annotations

import os

from torch import Tensor

from flash_mla import problem

_device_of = problem.device_of


def device_of(tensor: Tensor) -> tuple[str, int | None]:
    """Device type, and 100 on CUDA."""
    kind, capability = _device_of(tensor)
    return kind, None if capability is None else 100


problem.device_of = device_of
os.environ["FLASH_MLA_AS_BLACKWELL"] = "1"
