"""What a call must do at the least (FLOP, bytes), and what this machine can do at the most (measured ceilings).

This module needs torch alone (Triton is used where it is installed) and imports nothing from the package, so that
it can be loaded by file path beside another library that is also called ``flash_mla``.
"""

from __future__ import annotations

import importlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

try:
    _triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:
    _triton = None


@dataclass(frozen=True)
class Work:
    """The least that a call must do: floating-point operations, and bytes through device memory."""

    flop: int
    bytes: int
    row_bytes: int = 0
    """The bytes lie in rows of this size at random places; 0 where they are a stream."""

    def tflops(self, time_us: float) -> float:
        """Achieved TFLOPS when the call takes `time_us` microseconds."""
        return self.flop / time_us * 1e-6

    def gbps(self, time_us: float) -> float:
        """Achieved GB/s (1e9 bytes) when the call takes `time_us` microseconds."""
        return self.bytes / time_us * 1e-3


@dataclass(frozen=True)
class Ceilings:
    """What the machine was measured to do: a large matrix product in TFLOPS, reads from device memory in GB/s."""

    gemm_tflops: float
    read_gbps: float
    """A streaming read."""
    gather_gbps: dict[int, float] = field(default_factory=dict)
    """By their size in bytes, rows at random places."""

    def memory_gbps(self, work: Work) -> float:
        """The ceiling for the bytes of `work`: the gather of such rows where it was measured, else the stream."""
        return self.gather_gbps.get(work.row_bytes, self.read_gbps)

    def floor_us(self, work: Work) -> float:
        """The time below which `work` cannot be done: the slower one of arithmetic and memory."""
        return max(work.flop / self.gemm_tflops * 1e-6, work.bytes / self.memory_gbps(work) * 1e-3)

    def bound(self, work: Work) -> str:
        """Which ceiling is the floor of `work`: ``compute`` or ``memory``."""
        compute = work.flop / self.gemm_tflops * 1e-6
        return "compute" if compute >= work.bytes / self.memory_gbps(work) * 1e-3 else "memory"


def keys_seen(length: int, s_q: int, causal: bool) -> int:
    """Pairs of a query token and a key that it sees, for one request of `length` keys.

    Causal is aligned to the bottom right: query token j sees keys ``< length - (s_q - 1 - j)``.
    """
    if not causal:
        return s_q * length
    first_seeing = max(0, s_q - length)  # query tokens before this one see no key
    seeing = s_q - first_seeing
    return seeing * length - seeing * (seeing - 1) // 2


def dense_decode_work(
    lengths: Sequence[int],
    *,
    s_q: int,
    h_q: int,
    h_kv: int = 1,
    d_qk: int = 576,
    d_v: int = 512,
    causal: bool = True,
    itemsize: int = 2,
) -> Work:
    """FLOP and bytes of dense MLA decode over requests of `lengths` keys.

    FLOP = 2 * heads * keys * (d_qk + d_v), where keys counts what every query token really sees (the causal mask is
    taken off). Bytes = the keys of every request once (V is a part of K), plus q, plus out.
    """
    pairs = sum(keys_seen(length, s_q, causal) for length in lengths)
    flop = 2 * h_q * pairs * (d_qk + d_v)
    kv_bytes = sum(lengths) * h_kv * d_qk * itemsize
    q_and_out = len(lengths) * s_q * h_q * (d_qk + d_v) * itemsize
    return Work(flop=flop, bytes=kv_bytes + q_and_out)


def dense_prefill_work(
    lengths: Sequence[int],
    *,
    h_q: int,
    h_kv: int,
    d_qk: int = 192,
    d_v: int = 128,
    causal: bool = True,
    itemsize: int = 2,
) -> Work:
    """FLOP and bytes of dense prefill over sequences of `lengths` queries and as many keys.

    FLOP = 2 * heads * pairs * (d_qk + d_v), where pairs counts the keys that every query really sees. Bytes = q, k, v
    and out, once each.
    """
    pairs = sum(keys_seen(length, length, causal) for length in lengths)
    flop = 2 * h_q * pairs * (d_qk + d_v)
    return Work(flop=flop, bytes=sum(lengths) * (h_q + h_kv) * (d_qk + d_v) * itemsize)


def dense_prefill_backward_work(lengths: Sequence[int], **shape: Any) -> Work:
    """FLOP and bytes of the gradients of dense prefill: 2.5 times the FLOP of the forward, as is the custom for d_qk =
    d_v (2.6 times for 192 and 128). Bytes = q, k, v and out and the gradients of all four, once each.
    """
    forward = dense_prefill_work(lengths, **shape)
    return Work(flop=forward.flop * 5 // 2, bytes=2 * forward.bytes)


def sparse_decode_work(
    keys: int, *, h_q: int, d_qk: int = 576, d_v: int = 512, bytes_per_token: int = 656, row_bytes: int = 0
) -> Work:
    """FLOP and bytes of sparse MLA decode over `keys` selected cache rows, summed over all query tokens.

    FLOP = 2 * heads * keys * (d_qk + d_v). Bytes = the rows that each query token selects, also where another token
    selects them too; q, out and the indices are left out, so that memory's part of the floor is on the low side.
    `row_bytes`: how many bytes of a row lie together (all of them by default).
    """
    return Work(2 * h_q * keys * (d_qk + d_v), keys * bytes_per_token, row_bytes or bytes_per_token)


def sparse_prefill_work(
    s_q: int, s_kv: int, topk: int, *, h_q: int, d_qk: int = 576, d_v: int = 512, bytes_per_token: int = 1152
) -> Work:
    """FLOP and bytes of sparse prefill: `s_q` queries that select `topk` of `s_kv` rows each.

    FLOP = 2 * heads * s_q * topk * (d_qk + d_v). Bytes = the rows once (they are selected many times over, and what of
    that comes from a cache is no property of the call), q and out.
    """
    flop = 2 * h_q * s_q * topk * (d_qk + d_v)
    return Work(flop=flop, bytes=s_kv * bytes_per_token + 2 * s_q * h_q * (d_qk + d_v))


def sparse_prefill_backward_work(
    s_q: int, s_kv: int, topk: int, *, h_q: int, d_qk: int = 576, d_v: int = 512, bytes_per_token: int = 1152
) -> Work:
    """FLOP and bytes of the gradients of sparse prefill.

    FLOP = 2 * heads * s_q * topk * (3 * d_qk + 2 * d_v): the products of the scores, of the gradients of probabilities,
    q, K and V. Bytes = what the forward counts and the gradients of the same tensors, once each.
    """
    forward = sparse_prefill_work(s_q, s_kv, topk, h_q=h_q, d_qk=d_qk, d_v=d_v, bytes_per_token=bytes_per_token)
    return Work(flop=2 * h_q * s_q * topk * (3 * d_qk + 2 * d_v), bytes=2 * forward.bytes)


def measure_ceilings(device: torch.device | str, *, quick: bool = False, gather_rows: Sequence[int] = ()) -> Ceilings:
    """Measures the ceilings on `device`, in a few tenths of a second each.

    CUDA: a bf16 product of two random 8192 x 8192 matrices, and a streaming read of 8 GiB (less where that much
    memory is not free). CPU: a float32 product and a sum over 256 MiB. `gather_rows`: sizes in bytes, multiples of 4,
    of the rows whose gather from random places (of as much memory) is measured too.
    """
    device = torch.device(device)
    if device.type == "cuda":
        gather = {size: _cuda_gather_gbps(device, size) for size in gather_rows}
        return Ceilings(_cuda_gemm_tflops(device, quick), _cuda_read_gbps(device), gather)
    gather = {size: _cpu_gather_gbps(size, quick) for size in gather_rows}
    return Ceilings(_cpu_gemm_tflops(quick), _cpu_read_gbps(quick), gather)


def _cuda_gemm_tflops(device: torch.device, quick: bool) -> float:
    size = 8192
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty_like(a)
    seconds = _cuda_seconds(lambda: torch.mm(a, b, out=out), repeats=50 if quick else 200)
    return 2.0 * size**3 / seconds * 1e-12


def _cuda_read_gbps(device: torch.device) -> float:
    free, _ = torch.cuda.mem_get_info(device)
    count = min(8 << 30, int(free * 0.5)) // _READ_CHUNK * _READ_CHUNK // 4
    data = torch.randint(-1000, 1000, (count,), device=device, dtype=torch.int32)
    out = torch.empty(count * 4 // _READ_CHUNK, device=device, dtype=torch.int32)
    readers: list[Callable[[], object]] = [lambda: torch.sum(data.view(torch.float32))]
    if _triton is not None:
        readers.append(lambda: _read_kernel[(out.numel(),)](data, out, TILE=_READ_TILE, TILES=_READ_TILES, num_warps=8))
    return _best_gbps(readers, count * 4)


def _cuda_gather_gbps(device: torch.device, row_bytes: int) -> float:
    """Useful bytes: every row of a table is read once, in random order."""
    free, _ = torch.cuda.mem_get_info(device)
    words, chunk = row_bytes // 4, _GATHER_ROWS * _GATHER_TILES
    rows = min(8 << 30, int(free * 0.5)) // row_bytes // chunk * chunk
    table = torch.randint(-1000, 1000, (rows, words), device=device, dtype=torch.int32)
    order = torch.randperm(rows, device=device).int()
    out = torch.empty(rows // chunk, device=device, dtype=torch.int32)
    values, bags = table.view(torch.float32), order.view(-1, chunk)
    readers: list[Callable[[], object]] = [lambda: torch.nn.functional.embedding_bag(bags, values, mode="sum")]
    if _triton is not None:
        padded = 1 << (words - 1).bit_length()
        sizes = {"WORDS": words, "PADDED": padded, "ROWS": _GATHER_ROWS, "TILES": _GATHER_TILES}
        readers.append(lambda: _gather_kernel[(out.numel(),)](table, order, out, **sizes, num_warps=8))
    return _best_gbps(readers, rows * row_bytes)


def _best_gbps(readers: Sequence[Callable[[], object]], size: int) -> float:
    """GB/s of the fastest of `readers`, each of which reads `size` bytes; the first one always works."""
    best = 0.0
    for reader in readers:
        try:
            best = max(best, size / _cuda_seconds(reader, repeats=20) * 1e-9)
        except Exception:  # Triton may be installed but unable to build here; the other reader has measured
            if best == 0.0:
                raise
    return best


def _cuda_seconds(call: Callable[[], object], repeats: int) -> float:
    for _ in range(max(3, repeats // 4)):
        call()
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return statistics.median(float(a.elapsed_time(b)) * 1e-3 for a, b in itertools.pairwise(events))


def _cpu_gemm_tflops(quick: bool) -> float:
    size = 1024 if quick else 2048
    a, b = torch.randn(size, size), torch.randn(size, size)
    return 2.0 * size**3 / _cpu_seconds(lambda: torch.mm(a, b)) * 1e-12


def _cpu_read_gbps(quick: bool) -> float:
    data = torch.ones((64 if quick else 256) << 18)
    return data.numel() * 4 / _cpu_seconds(lambda: torch.sum(data)) * 1e-9


def _cpu_gather_gbps(row_bytes: int, quick: bool) -> float:
    rows = ((64 if quick else 256) << 20) // row_bytes // 64 * 64
    table, order = torch.ones(rows, row_bytes // 4), torch.randperm(rows).view(-1, 64)
    seconds = _cpu_seconds(lambda: torch.nn.functional.embedding_bag(order, table, mode="sum"))
    return rows * row_bytes / seconds * 1e-9


def _cpu_seconds(call: Callable[[], object], repeats: int = 5) -> float:
    samples = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return max(min(samples[1:]), math.ulp(1.0))


# Every program of the read kernel streams _READ_TILES tiles of _READ_TILE int32, all loads independent.
_READ_TILE = 4096
_READ_TILES = 4
_READ_CHUNK = _READ_TILE * _READ_TILES * 4


def _read_tiles(data, out, TILE: tl.constexpr, TILES: tl.constexpr):  # type: ignore
    program = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, TILE)
    total = tl.zeros([TILE], dtype=tl.int32)
    for tile in tl.static_range(TILES):
        total += tl.load(data + (program * TILES + tile) * TILE + offsets)
    tl.store(out + program, tl.sum(total, axis=0))


# Every program of the gather kernel reads _GATHER_TILES tiles of _GATHER_ROWS rows, all loads of a tile independent.
_GATHER_ROWS = 16
_GATHER_TILES = 4


def _gather_tiles(data, order, out, WORDS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):  # type: ignore
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, PADDED)[None, :]
    total = tl.zeros([ROWS, PADDED], dtype=tl.int32)
    for tile in tl.static_range(TILES):
        rows = tl.load(order + (program * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        total += tl.load(data + rows[:, None] * WORDS + columns, mask=columns < WORDS, other=0)
    tl.store(out + program, tl.sum(tl.sum(total, axis=1), axis=0))


_read_kernel: Any = None if _triton is None else _triton.jit(_read_tiles)
_gather_kernel: Any = None if _triton is None else _triton.jit(_gather_tiles)
