"""`timing`, `roofline` and `progress` of flash_mla.testing, loaded by file path.

A worker that runs a peer whose module is also called ``flash_mla`` must not import ours.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        f"benchmarks._testing_{name}", ROOT / "flash_mla" / "testing" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


timing = _load("timing")
roofline = _load("roofline")
progress = _load("progress")
