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
    op: str = "dense_decode"

    def keys(self) -> int:
        """Rows of the cache that one call reads."""
        return sum(self.lengths())

    def lengths(self) -> list[int]:
        """Keys of each request."""
        if not self.varied:
            return [self.length] * self.b
        draw = random.Random(self.seed)
        return [draw.randint(self.length // 2, self.length + self.length // 2) for _ in range(self.b)]

    def kv_bytes(self) -> int:
        """Bytes of the cache that one call reads."""
        return self.keys() * self.h_kv * self.d_qk * ITEM_SIZE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Format:
    """What is counted of a cache format; `row_bytes` of the `bytes_per_token` lie together."""

    d_qk: int
    bytes_per_token: int
    row_bytes: int


FORMATS = {"V32": Format(576, 656, 656), "MODEL1": Format(512, 584, 576)}


@dataclass(frozen=True)
class SparseShape:
    """One sparse decode call over FP8 caches.

    Every query token selects `topk` of the `context` tokens of its request, and `extra_topk` of `extra_context` in a
    second cache, where there is one. `varied`: of each, only the first 1 to all count, another number for each request,
    uniform with a fixed seed.
    """

    name: str
    b: int
    s_q: int
    h_q: int
    kv_format: str
    topk: int
    extra_topk: int = 0
    extra_page: int = 64
    varied: bool = False
    page: int = 64
    context: int = 16384
    extra_context: int = 8192
    sink: bool = False
    d_v: int = 512
    seed: int = SEED
    goals: dict[str, float] = field(default_factory=dict, hash=False)
    op: str = "sparse_decode"

    @property
    def format(self) -> Format:
        return FORMATS[self.kv_format]

    @property
    def d_qk(self) -> int:
        return self.format.d_qk

    def counts(self) -> list[tuple[int, int]]:
        """How many rows a query token of each request selects from the one cache and from the other."""
        if not self.varied:
            return [(self.topk, self.extra_topk)] * self.b
        draw = random.Random(self.seed)
        return [
            (draw.randint(1, self.topk), draw.randint(1, self.extra_topk) if self.extra_topk else 0)
            for _ in range(self.b)
        ]

    def keys(self) -> int:
        """Rows that all query tokens of one call select."""
        return self.s_q * sum(first + second for first, second in self.counts())

    def kv_bytes(self) -> int:
        """Bytes of those rows."""
        return self.keys() * self.format.bytes_per_token

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PrefillShape:
    """One dense prefill call over `b` sequences of as many queries as keys. `varied` draws each length uniformly from
    `shortest` to `length` with a fixed seed."""

    name: str
    b: int
    length: int
    h_q: int
    causal: bool
    varied: bool = False
    shortest: int = 100
    d_qk: int = 192
    d_v: int = 128
    dtype: str = "bf16"
    seed: int = SEED
    goals: dict[str, float] = field(default_factory=dict, hash=False)
    op: str = "dense_prefill"

    @property
    def h_kv(self) -> int:
        return self.h_q

    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        if not self.varied:
            return [self.length] * self.b
        draw = random.Random(self.seed)
        return [draw.randint(self.shortest, self.length) for _ in range(self.b)]

    def keys(self) -> int:
        """Tokens of one call."""
        return sum(self.lengths())

    def kv_bytes(self) -> int:
        """Bytes of K and V."""
        return self.keys() * self.h_kv * (self.d_qk + self.d_v) * ITEM_SIZE[self.dtype]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class PrefillBackwardShape(PrefillShape):
    """The gradients of q, k and v of such a call, whose results are given."""

    deterministic: bool = False
    op: str = "dense_prefill_backward"


@dataclass(frozen=True)
class SparsePrefillShape:
    """One sparse prefill call: each of `s_q` queries selects `topk` different rows of `s_kv`.

    `source`: "BF16" rows, a paged cache of the format "V32", or "V32 copied": such a cache that is first made into bf16
    rows, which belongs to the call.
    """

    name: str
    s_q: int
    h_q: int
    topk: int
    s_kv: int
    d_qk: int = 576
    d_v: int = 512
    source: str = "BF16"
    sink: bool = True
    dtype: str = "bf16"
    seed: int = SEED
    goals: dict[str, float] = field(default_factory=dict, hash=False)
    op: str = "sparse_prefill"

    @property
    def b(self) -> int:
        """Queries: what is checked one by one."""
        return self.s_q

    def keys(self) -> int:
        """Rows that all queries of one call select."""
        return self.s_q * self.topk

    def kv_bytes(self) -> int:
        """Bytes of those rows: far more than any cache holds, so one set of inputs is enough."""
        return self.keys() * self.bytes_per_token

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.d_qk if self.source == "BF16" else FORMATS["V32"].bytes_per_token

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SparsePrefillBackwardShape(SparsePrefillShape):
    """The gradients of q, kv and the sink of such a call over BF16 rows, whose results are given."""

    deterministic: bool = False
    op: str = "sparse_prefill_backward"


AnyShape = Shape | SparseShape | PrefillShape | SparsePrefillShape
_KINDS: dict[str, Any] = {
    "sparse_decode": SparseShape,
    "dense_prefill": PrefillShape,
    "dense_prefill_backward": PrefillBackwardShape,
    "sparse_prefill": SparsePrefillShape,
    "sparse_prefill_backward": SparsePrefillBackwardShape,
}


def from_json(values: dict[str, Any]) -> AnyShape:
    """The shape that ``to_json`` made `values` of."""
    shape: AnyShape = _KINDS.get(values.get("op", ""), Shape)(**values)
    return shape


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

_SMALL_BATCH = 1.6  # two requests leave most of the GPU idle: what counts is latency


def _v32(h_q: int, s_q: int, b: int, goals: dict[str, float], *, long: bool = False) -> SparseShape:
    name = f"sparse_v32_h{h_q}_sq{s_q}_b{b}"
    if long:
        return SparseShape(f"{name}_16k", b, s_q, h_q, "V32", 16384, context=32768, goals=goals)
    return SparseShape(name, b, s_q, h_q, "V32", 2048, goals=goals)


def _model1(h_q: int, extra_topk: int, b: int, goal: float, suffix: str = "", **options: Any) -> SparseShape:
    """As a layer of DeepSeek-V4 calls it: the last tokens' cache is the first one, the compressed cache the second."""
    return SparseShape(
        f"sparse_model1_h{h_q}_sq2{suffix}_b{b}",
        b,
        2,
        h_q,
        "MODEL1",
        128,
        extra_topk,
        context=1024,
        sink=True,
        goals=_both(_SMALL_BATCH if b == 2 else goal),
        **options,
    )


SPARSE = [
    *(_v32(128, 2, b, _both(_SMALL_BATCH if b == 2 else 1.35)) for b in (2, 64, 128)),
    _v32(128, 2, 148, _both(1.35), long=True),
    _v32(64, 2, 148, {"h100": 1.4, "h200": 1.6}, long=True),
    SparseShape(
        "sparse_model1_h128_sq2_b148_16k", 148, 2, 128, "MODEL1", 16384, context=32768, sink=True, goals=_both(1.28)
    ),
    _v32(64, 1, 128, {"h100": 1.4, "h200": 1.6}),
    *(_v32(h, 1, 128, {"h100": 1.5, "h200": 2.0}) for h in (32, 16, 8)),
    *(_model1(64, 512, b, 1.5) for b in (2, 64, 256)),
    *(
        _model1(128, 1024, b, 1.35, suffix, **options)
        for suffix, options in (("", {}), ("_page2", {"extra_page": 2}), ("_varied", {"varied": True}))
        for b in (2, 64, 128, 256)
    ),
]


def _prefill(b: int, length: int, name: str, h_q: int, causal: bool, goal: float, varied: bool = False) -> PrefillShape:
    mask = "causal" if causal else "full"
    return PrefillShape(f"prefill_{mask}_h{h_q}_{name}", b, length, h_q, causal, varied, goals=_both(goal))


DENSE_PREFILL = [
    _prefill(b, length, name, h_q, causal, 1.0)
    for h_q in (128, 16)
    for causal in (True, False)
    for b, length, name in ((1, 8192, "1x8k"), (1, 16384, "1x16k"), (4, 4096, "4x4k"), (32, 1024, "32x1k"))
] + [_prefill(64, 8192, "varied", 16, causal, 1.1, varied=True) for causal in (True, False)]


def _backward(
    b: int, length: int, name: str, h_q: int, causal: bool, deterministic: bool = False, **options: Any
) -> PrefillBackwardShape:
    words = ["causal" if causal else "full", f"h{h_q}", name, *["deterministic"] * deterministic]
    name = "_".join(["prefill_backward", *words])
    return PrefillBackwardShape(name, b, length, h_q, causal, deterministic=deterministic, **options)


DENSE_PREFILL_BACKWARD = [
    *(
        _backward(1, length, name, 128, True, deterministic)
        for length, name in ((8192, "1x8k"), (16384, "1x16k"))
        for deterministic in (False, True)
    ),
    _backward(4, 4096, "4x4k", 128, True),
    _backward(32, 1024, "32x1k", 128, True),
    *(_backward(1, 8192, "1x8k", 128, False, deterministic) for deterministic in (False, True)),
    *(_backward(1, 8192, "1x8k", 16, causal) for causal in (True, False)),
    _backward(64, 8192, "varied", 16, True, varied=True),
    _backward(1, 8192, "1x8k_d128", 128, True, d_qk=128),
    _backward(1, 8192, "1x8k_fp16", 128, True, dtype="fp16"),
]

_S_KV = {"8k": 8192, "64k": 65536, "128k": 131072}

SPARSE_PREFILL = [
    *(
        SparsePrefillShape(f"sparse_prefill_d576_h128_{k}", 4096, 128, 2048, s_kv, goals=_both(1.15))
        for k, s_kv in _S_KV.items()
    ),
    SparsePrefillShape("sparse_prefill_d512_h64_topk512_32k", 4096, 64, 512, 32768, 512, goals=_both(1.35)),
    SparsePrefillShape("sparse_prefill_d512_h128_topk1024_32k", 4096, 128, 1024, 32768, 512, goals=_both(1.2)),
    *(
        SparsePrefillShape(f"sparse_prefill_d576_h{h}_8k", 4096, h, 2048, 8192, goals=_both(1.5))
        for h in (64, 32, 16, 8)
    ),
    *(
        SparsePrefillShape(f"sparse_prefill_v32{how}_h128_{k}", 4096, 128, 2048, _S_KV[k], source=f"V32{what}")
        for k in ("8k", "128k")
        for how, what in (("", ""), ("_copied", " copied"))
    ),
]


def _sparse_backward(
    h_q: int, topk: int, s_kv: str, d_qk: int = 576, deterministic: bool = False
) -> SparsePrefillBackwardShape:
    words = [f"d{d_qk}", f"h{h_q}", *[f"topk{topk}"] * (topk != 2048), s_kv, *["deterministic"] * deterministic]
    name = "_".join(["sparse_prefill_backward", *words])
    return SparsePrefillBackwardShape(name, 4096, h_q, topk, _S_KV[s_kv], d_qk, deterministic=deterministic)


SPARSE_PREFILL_BACKWARD = [
    *(_sparse_backward(128, 2048, s_kv) for s_kv in ("8k", "64k")),
    _sparse_backward(128, 2048, "8k", deterministic=True),
    *(_sparse_backward(h, 2048, "8k") for h in (64, 16)),
    _sparse_backward(64, 512, "8k", 512),
    _sparse_backward(128, 1024, "8k", 512),
]

# Small enough for a CPU: for trying the tool itself.
SMOKE = [
    Shape("smoke_h4_b2_100", 2, 1, 4, 100),
    Shape("smoke_h4_sq2_b2_200", 2, 2, 4, 200, varied=False),
    SparseShape("smoke_sparse_v32_h4_b2", 2, 1, 4, "V32", 64, context=300),
    SparseShape(
        "smoke_sparse_model1_h4_sq2_b2", 2, 2, 4, "MODEL1", 64, 128, 2, True, context=100, extra_context=150, sink=True
    ),
    PrefillShape("smoke_prefill_h2_b3", 3, 60, 2, True, varied=True, shortest=1),
    PrefillBackwardShape("smoke_prefill_backward_h2_b3", 3, 60, 2, True, varied=True, shortest=1),
    SparsePrefillShape("smoke_sparse_prefill_h4", 6, 4, 40, 100),
    SparsePrefillShape("smoke_sparse_prefill_v32_h4", 6, 4, 40, 100, source="V32"),
    SparsePrefillBackwardShape("smoke_sparse_prefill_backward_h4", 6, 4, 40, 100),
]

# What the reference is expected to do on two cores in less than two seconds.
CPU = [
    Shape("cpu_dense_h128_b8_4k", 8, 1, 128, 4096, varied=False),
    SparseShape("cpu_sparse_v32_h128_b8", 8, 1, 128, "V32", 2048),
]

GROUPS: dict[str, list[AnyShape]] = {
    "goals": GOALS,
    "heads": HEADS,
    "pages": PAGES,
    "variants": VARIANTS,
    "sparse": SPARSE,
    "dense_prefill": DENSE_PREFILL,
    "dense_prefill_backward": DENSE_PREFILL_BACKWARD,
    "sparse_prefill": SPARSE_PREFILL,
    "sparse_prefill_backward": SPARSE_PREFILL_BACKWARD,
    "cpu": CPU,
    "smoke": SMOKE,
}
_NAMED: dict[str, AnyShape] = {}
for _shape in (shape for group in GROUPS.values() for shape in group):
    _NAMED.setdefault(_shape.name, _shape)  # where two groups share a shape, the one with goals comes first
GROUPS["quick"] = [
    _NAMED[name]
    for name in ("dense_h128_sq2_8k", "dense_h128_sq1_8k", "dense_h16_b64_8k", "dense_h128_b4_1024", "dense_h16_b1_1k")
]
GROUPS["sparse_quick"] = [
    _NAMED[name]
    for name in (
        "sparse_v32_h128_sq2_b128",
        "sparse_v32_h128_sq2_b2",
        "sparse_v32_h64_sq1_b128",
        "sparse_v32_h16_sq1_b128",
        "sparse_model1_h128_sq2_b64",
    )
]
# The portable backend beside the CUDA kernels: every operation, few heads and many, bound by memory and by arithmetic.
GROUPS["portable"] = [
    _NAMED[name]
    for name in (
        "dense_h16_b64_8k",
        "dense_h16_b128_1k",
        "dense_h16_b128_4k",
        "dense_h32_b128_4k",
        "dense_h64_b128_4k",
        "dense_h128_sq1_4k",
        "dense_h128_sq2_8k",
        "sparse_v32_h16_sq1_b128",
        "sparse_v32_h32_sq1_b128",
        "sparse_v32_h64_sq1_b128",
        "sparse_v32_h128_sq2_b128",
        "sparse_model1_h64_sq2_b256",
        "sparse_model1_h128_sq2_b128",
        "sparse_prefill_d576_h16_8k",
        "sparse_prefill_d576_h64_8k",
        "sparse_prefill_d576_h128_8k",
        "sparse_prefill_v32_h128_8k",
        "sparse_prefill_d512_h128_topk1024_32k",
        "prefill_causal_h16_4x4k",
        "prefill_full_h16_1x8k",
        "prefill_causal_h128_32x1k",
    )
]
GROUPS["all"] = [shape for shape in _NAMED.values() if shape not in (*SMOKE, *CPU)]


def select(groups: list[str], names: list[str]) -> list[AnyShape]:
    """The shapes of `groups` and those that match `names` (shell patterns), each once. KeyError where none does."""
    chosen: dict[str, AnyShape] = {}
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
