"""Tile sizes, chosen by architecture and shared memory. Needs no Triton."""

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flash_mla import problem
from flash_mla.problem_prefill import HEAD_DIM_V

INTERPRETED_SMS = 4
"""Multiprocessors that the interpreter pretends to have: enough for split requests, few enough to be quick."""


@dataclass(frozen=True)
class Gpu:
    """What the choice of tiles depends on."""

    capability: int
    """90 for 9.0."""
    shared_memory: int
    """Bytes that one block may use."""
    num_sms: int

    @staticmethod
    def of(device: torch.device) -> "Gpu":
        """The GPU that a tensor is on; for the CPU, what the interpreter stands for."""
        if device.type != "cuda":
            return INTERPRETED
        return _gpu(torch.cuda.current_device() if device.index is None else device.index)


INTERPRETED = Gpu(90, 232448, INTERPRETED_SMS)


@lru_cache(maxsize=64)
def _gpu(index: int) -> Gpu:
    properties: Any = torch.cuda.get_device_properties(index)  # not fully typed
    return Gpu(
        10 * properties.major + properties.minor,
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        properties.multi_processor_count,
    )


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels. Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut: rows (token and head pairs), keys, warps, and stages of the pipeline that loads keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


D_ROPE = 64
"""Values of the RoPE part."""

RESERVED_SHARED_MEMORY = 6 * 1024
"""Probabilities, reductions and conversions between layouts, beside the tiles."""


def shared_bytes(tile: Tile, d_qk: int, warpgroups: bool) -> int:
    """Shared memory that a tile needs for q and the keys in flight, in bytes.

    `warpgroups`: the product is asynchronous (64 rows and more on SM90), and keeps one stage more alive.
    """
    buffers = tile.num_stages if warpgroups else max(tile.num_stages - 1, 1)
    return 2 * d_qk * (tile.block_m + buffers * tile.block_n)


def _largest_height(gpu: Gpu) -> int:
    """64 rows need SM90's tensor cores, which read q from shared memory: elsewhere 64 rows of the accumulator, 512
    columns wide, do not fit into the registers, and on SM100 Triton keeps a second copy of the keys for them.
    """
    return 64 if gpu.capability == 90 and gpu.shared_memory > 200 * 1024 else 32


# In order of preference, for tiles of 16, 32 and 64 rows. The first that fits is taken. Wide key tiles and a second
# tile in flight hide latency; where 100 KB must hold all (SM86, SM89, SM120), d_qk 576 leaves 16 or 32 keys.
_CANDIDATES = {
    16: (Tile(16, 64, 8, 3), Tile(16, 32, 8, 4), Tile(16, 32, 8, 3), Tile(16, 16, 4, 2)),
    32: (Tile(32, 64, 8, 3), Tile(32, 32, 8, 3), Tile(32, 16, 8, 3), Tile(32, 16, 8, 2)),
    64: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
}


LONG_KEYS = 4096
"""From so many keys on a request is a long one."""

_LONG = {16: Tile(16, 64, 4, 2), 32: Tile(32, 64, 4, 2)}
"""Two programs on a multiprocessor of SM90, of which one loads while the other multiplies. Perf, with all keys in the
L2 cache, which is what a faster memory leaves (H100): 129 us where tiles of one program take 151 and more (16 heads, 64
requests of 8k keys), 196 where they take 230 (32 heads, 128 of 4k). From an H100's memory 225 and 266 instead of 220
and 253.
"""


def _pairs(gpu: Gpu, height: int) -> bool:
    """Whether two programs of dense decode share a multiprocessor, where keys are many. Measured on SM90 only."""
    return height in _LONG and _largest_height(gpu) == 64


@lru_cache(maxsize=1024)
def dense_tiles(gpu: Gpu, rows: int, d_qk: int, long: bool = False) -> tuple[Tile, ...]:
    """The tiles of dense decode for `rows` (token, head) pairs per key head that fit, the preferred one first.

    They depend on the shape of one request alone, so that a batch-invariant call may use the first; unless it may be
    `long`, by the width of the block table.
    """
    height = 16 if rows <= 16 else 32 if rows <= 32 else _largest_height(gpu)

    def fits(tile: Tile) -> bool:
        return shared_bytes(tile, d_qk, height == 64) + RESERVED_SHARED_MEMORY <= gpu.shared_memory

    tiles = tuple(tile for tile in _CANDIDATES[height] if fits(tile)) or _CANDIDATES[16][-1:]
    return (_LONG[height], *tiles) if long and _pairs(gpu, height) else tiles


def dense_tile(gpu: Gpu, rows: int, d_qk: int, long: bool = False) -> Tile:
    """The preferred one of `dense_tiles`."""
    return dense_tiles(gpu, rows, d_qk, long)[0]


_SPARSE_CANDIDATES = {
    16: (Tile(16, 64, 4, 2), Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 2)),
    32: (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(32, 16, 4, 2)),
    64: (Tile(64, 64, 8, 2), Tile(64, 32, 8, 2)),
}
# Perf: 205 us of 64 rows against 262 of 16 and 324 of 32 (H100, 32 heads, V32): registers that hold 32 rows of sums
# leave too few to convert keys.
_QUANTISED_CANDIDATES = {
    16: (Tile(16, 32, 4, 3), Tile(16, 32, 4, 2), Tile(16, 16, 4, 3)),
    64: (Tile(64, 64, 8, 3), Tile(64, 64, 8, 2), Tile(64, 32, 8, 3)),
}


@lru_cache(maxsize=1024)
def sparse_tiles(gpu: Gpu, heads: int, d_qk: int, in_flight: int, wide_v: bool = False) -> tuple[Tile, ...]:
    """The tiles of sparse attention over `heads` query heads, and of dense decode over quantised caches, that fit, the
    preferred one first; `dense_tiles` says what limits them.

    `in_flight`: bytes that a quantised key takes while it is loaded, beside its place among the operands of products; 0
    for bfloat16, which is loaded to that place. `wide_v`: V has more than 512 values.
    """
    height = 16 if heads <= 16 else 32 if heads <= 32 else _largest_height(gpu)
    if in_flight and height > 16:
        height = 64 if _largest_height(gpu) == 64 else 16

    def fits(tile: Tile) -> bool:
        ahead = max(tile.num_stages - 1, 1)
        if in_flight and height == 64:  # one place for the RoPE part, where V is without it, and for probabilities
            keys = 2 * (problem.HEAD_DIM_V + D_ROPE + D_ROPE * wide_v) + ahead * in_flight
            return 2 * d_qk * height + tile.block_n * keys <= gpu.shared_memory
        keys = 2 * d_qk + ahead * in_flight if in_flight else 2 * d_qk * (ahead + (height == 64))
        return 2 * d_qk * height + tile.block_n * keys + RESERVED_SHARED_MEMORY <= gpu.shared_memory

    candidates = (_QUANTISED_CANDIDATES if in_flight else _SPARSE_CANDIDATES)[height]
    return tuple(tile for tile in candidates if fits(tile)) or _QUANTISED_CANDIDATES[16][-1:]


_PREFILL_CANDIDATES = (Tile(128, 128, 8, 2), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2), Tile(128, 32, 8, 2))

_INTERPRETED_PREFILL = Tile(64, 32, 4, 2)
"""Quicker for short sequences, and several of them in those of tests."""


@lru_cache(maxsize=64)
def prefill_tiles(gpu: Gpu, d_qk: int) -> tuple[Tile, ...]:
    """The tiles of dense prefill that fit, the preferred one first, and only on SM90 with 128 keys: elsewhere the
    scores of so many do not fit into the registers.
    """
    if gpu is INTERPRETED:
        return (_INTERPRETED_PREFILL,)
    warpgroups = gpu.capability == 90

    def fits(tile: Tile) -> bool:
        buffers = tile.num_stages if warpgroups else max(tile.num_stages - 1, 1)
        needed = 2 * (d_qk * tile.block_m + buffers * tile.block_n * (d_qk + HEAD_DIM_V))
        return needed + RESERVED_SHARED_MEMORY <= gpu.shared_memory

    candidates = _PREFILL_CANDIDATES if warpgroups else _PREFILL_CANDIDATES[1:]
    return tuple(tile for tile in candidates if fits(tile)) or candidates[-1:]


def converts_fp8(gpu: Gpu) -> bool:
    """Whether the GPU converts FP8 itself. The interpreter takes the other way, which needs testing more."""
    return gpu.capability >= 89 and gpu is not INTERPRETED and not interpreting()


MAX_PARTS = 1024
"""The most parts of a plan of ours."""


def num_sparse_parts(gpu: Gpu, s_q: int, h_q: int) -> int:
    """Rows of a plan of sparse decode; `num_parts` says how many. Tiles of 16 rows leave room for two programs."""
    # The format is not known when a plan is made; it does not change the height of the tile.
    height = sparse_tiles(gpu, h_q, 576, 0)[0].block_m
    programs = gpu.num_sms * (2 if height == 16 else 1)
    return max(1, min(programs // (s_q * -(-h_q // height)), MAX_PARTS))


def num_parts(gpu: Gpu, s_q: int, h_q: int, h_kv: int) -> tuple[int, int]:
    """Rows of a plan, and how many of them are used where keys are few: as many as fill the machine once.

    More would balance better, but the memory for partial results grows with them.
    """
    rows = s_q * (h_q // h_kv)
    # d_qk is not known when a plan is made; it does not change the height of the tile.
    height = dense_tile(gpu, rows, 576).block_m
    tiles = h_kv * -(-rows // height)
    few = max(1, min(gpu.num_sms // tiles, MAX_PARTS))
    return (max(1, min(2 * gpu.num_sms // tiles, MAX_PARTS)) if _pairs(gpu, height) else few), few
