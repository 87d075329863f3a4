"""The named shapes, and the groups that the command line takes. Plain Python: no torch."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

SEED = 20260401
ITEM_SIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Shape:
    """One dense decode call. `varied` draws each length uniformly from [0.5, 1.5] * `length` with a fixed seed."""

    name: str
    b: int
    s_q: int
    h_q: int
    length: int
    varied: bool = True
    h_kv: int = 1
    d_qk: int = 576
    d_v: int = 512
    page: int = 64
    dtype: str = "bf16"
    causal: bool = True
    seed: int = SEED
    # GPU -> how many times as fast as the faster peer this shape is meant to be.
    goals: dict[str, float] = field(default_factory=dict, hash=False)

    def lengths(self) -> list[int]:
        """Keys of each request."""
        if not self.varied:
            return [self.length] * self.b
        draw = random.Random(self.seed)
        return [draw.randint(self.length // 2, self.length + self.length // 2) for _ in range(self.b)]

    def kv_bytes(self) -> int:
        """Bytes of the cache that one call reads."""
        return sum(self.lengths()) * self.h_kv * self.d_qk * ITEM_SIZE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Shape:
        return cls(**values)


def _both(goal: float) -> dict[str, float]:
    return {"h100": goal, "h200": goal}


_LENGTHS = {"4k": 4096, "8k": 8192, "16k": 16384, "32k": 32768}

GOALS = [
    *(Shape(f"dense_h128_sq2_{k}", 128, 2, 128, n, goals=_both(1.07)) for k, n in _LENGTHS.items()),
    *(Shape(f"dense_h128_sq1_{k}", 128, 1, 128, n, goals={"h100": 1.1, "h200": 1.05}) for k, n in _LENGTHS.items()),
    Shape("dense_h16_b64_8k", 64, 1, 16, 8192, goals=_both(1.2)),
    Shape("dense_h16_b128_1k", 128, 1, 16, 1024, varied=False, goals=_both(1.15)),
    Shape("dense_h64_b128_4k", 128, 1, 64, 4096, goals=_both(1.2)),
    Shape("dense_h128_b1_131072", 1, 1, 128, 131072, varied=False, goals=_both(1.3)),
    Shape("dense_h128_b4_1024", 4, 1, 128, 1024, varied=False, goals=_both(1.3)),
    Shape("dense_h16_b1_1k", 1, 1, 16, 1024, varied=False, goals=_both(1.3)),
    *(
        Shape(f"dense_h16_sq{s_q}_b16_{k}", 16, s_q, 16, n, goals=_both(1.3))
        for s_q in (4, 16)
        for k, n in {"1k": 1024, "8k": 8192}.items()
    ),
]

# One rank of a tensor-parallel engine holds 128 / ranks heads: time against heads, all else equal.
HEADS = [Shape(f"dense_h{h}_b128_4k", 128, 1, h, 4096) for h in (8, 16, 32, 64, 128)]

PAGES = [Shape(f"dense_h128_sq1_8k_page{p}", 128, 1, 128, 8192, page=p) for p in (16, 32, 128, 256)]

VARIANTS = [
    Shape("dense_h128_sq2_8k_fp16", 128, 2, 128, 8192, dtype="fp16"),
    Shape("dense_h128_sq2_8k_d512", 128, 2, 128, 8192, d_qk=512),
    Shape("dense_h16_b64_8k_d512", 64, 1, 16, 8192, d_qk=512),
    Shape("dense_h128_sq2_8k_full", 128, 2, 128, 8192, causal=False),
    Shape("dense_h16_b1_32k", 1, 1, 16, 32768, varied=False),
    Shape("dense_h128_sq64_b4_8k", 4, 64, 128, 8192),
]

# Small enough for a CPU: for trying the tool itself.
SMOKE = [
    Shape("smoke_h4_b2_100", 2, 1, 4, 100),
    Shape("smoke_h4_sq2_b2_200", 2, 2, 4, 200, varied=False),
]

GROUPS: dict[str, list[Shape]] = {
    "goals": GOALS,
    "heads": HEADS,
    "pages": PAGES,
    "variants": VARIANTS,
    "smoke": SMOKE,
}
_NAMED: dict[str, Shape] = {}
for _shape in (shape for group in GROUPS.values() for shape in group):
    _NAMED.setdefault(_shape.name, _shape)  # where two groups share a shape, the one with goals comes first
GROUPS["quick"] = [
    _NAMED[name]
    for name in ("dense_h128_sq2_8k", "dense_h128_sq1_8k", "dense_h16_b64_8k", "dense_h128_b4_1024", "dense_h16_b1_1k")
]
GROUPS["all"] = [shape for shape in _NAMED.values() if shape not in SMOKE]


def select(groups: list[str], names: list[str]) -> list[Shape]:
    """The shapes of `groups` and those that match `names` (shell patterns), each once. KeyError where none does."""
    chosen: dict[str, Shape] = {}
    for group in groups:
        if group not in GROUPS:
            raise KeyError(f"no group {group!r}; groups: {', '.join(sorted(GROUPS))}")
        chosen.update((shape.name, _NAMED[shape.name]) for shape in GROUPS[group])
    for name in names:
        matching = [shape for shape in _NAMED.values() if fnmatchcase(shape.name, name)]
        if not matching:
            raise KeyError(f"no shape {name!r}; shapes: {', '.join(_NAMED)}")
        chosen.update((shape.name, shape) for shape in matching)
    return list(chosen.values())
