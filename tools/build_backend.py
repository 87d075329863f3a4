"""setuptools' build backend, which asks only for what this machine's build needs.

A fixed list of requirements would have pip download gigabytes of torch for every isolated build. The headers of any
torch from 2.10 on do (the ABI is stable), so the installed one serves, although isolation hides it from `import`.
"""

from __future__ import annotations

from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

import build_native


def native_requirements() -> list[str]:
    try:
        if not build_native.make_plan().arches:
            return []
    except build_native.BuildError:
        return []  # the build itself says it again, where pip shows it
    requirements = ["ninja"]
    if not build_native.cutlass_include():
        requirements.append(build_native.CUTLASS_REQUIREMENT)
    if not build_native.find_torch():
        requirements.append("torch>=2.10")
    return requirements


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_wheel(config_settings), *native_requirements()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return [*build_meta.get_requires_for_build_editable(config_settings), *native_requirements()]
