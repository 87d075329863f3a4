"""Timing that means something: CUDA-graph replays over rotating inputs, host cost of eager calls, plain CPU timing.

This module needs torch alone and imports nothing from the package, so that it can be loaded by file path beside
another library that is also called ``flash_mla``.
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

# A set of inputs that is this many times larger than the L2 cache leaves nothing useful behind in it.
_L2_MULTIPLE = 20
_MAX_SETS = 256
_MAX_CALLS_PER_GRAPH = 1024
# Two event records and a graph launch cost a few microseconds: below 1 % of a replay that lasts this long.
_MIN_REPLAY_US = 1000.0


@dataclass(frozen=True)
class Timing:
    """Time of one call in microseconds: median, fastest and slowest of `samples` measurements.

    `method` is ``graph`` (CUDA-graph replays), ``eager`` (CUDA events around eager calls) or ``cpu`` (wall clock).
    `began` and `ended` are ``time.time()`` values that enclose the measured part (to match clock readings with it).
    """

    median_us: float
    min_us: float
    max_us: float
    samples: int
    calls_per_sample: int
    method: str
    began: float
    ended: float


def rotation_sets(bytes_per_set: int, l2_bytes: int, max_sets: int = _MAX_SETS) -> int:
    """How many input sets to rotate through so that no call finds its inputs in the L2 cache."""
    if bytes_per_set <= 0 or l2_bytes <= 0:
        return 1
    return max(1, min(max_sets, math.ceil(_L2_MULTIPLE * l2_bytes / bytes_per_set)))


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache of a CUDA device; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


class CudaTimer:
    """Captures a rotation of calls in one CUDA graph and times its replays.

    `calls` is one callable per input set. The graph holds every call of the rotation at least once, and as many
    rounds of it as make a replay long against the cost of two events. Where a call cannot be captured, the timer
    falls back to eager calls and says so in ``Timing.method``; `capture_error` then holds the reason.
    """

    def __init__(self, calls: Sequence[Call], *, graph: bool = True) -> None:
        if not calls:
            raise ValueError("calls must hold at least one callable")
        self.capture_error = ""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = list(calls)
        for call in self._calls[:3]:
            call()
        torch.cuda.synchronize()
        rounds = self._rounds(self._eager_estimate_us())
        self.calls_per_replay = len(self._calls) * rounds
        if graph:
            self._capture(rounds)

    def _eager_estimate_us(self) -> float:
        begin, end = _event(), _event()
        count = min(len(self._calls), 8)
        begin.record()
        for call in self._calls[:count]:
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3 / count

    def _rounds(self, call_us: float) -> int:
        # Eager calls of small shapes are bound by the host, so the estimate is high: ask for four times as many.
        wanted = math.ceil(4 * _MIN_REPLAY_US / max(call_us, 1.0))
        return max(1, min(math.ceil(wanted / len(self._calls)), _MAX_CALLS_PER_GRAPH // len(self._calls)))

    def _capture(self, rounds: int) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            side = _stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                self._calls[0]()
            torch.cuda.current_stream().wait_stream(side)
            with torch.cuda.graph(graph):
                for _ in range(rounds):
                    for call in self._calls:
                        call()
        except RuntimeError as error:
            self.capture_error = f"{type(error).__name__}: {error}"
            torch.cuda.synchronize()
            return
        self._graph = graph

    def _replay(self) -> None:
        if self._graph is not None:
            self._graph.replay()
            return
        for index in range(self.calls_per_replay):
            self._calls[index % len(self._calls)]()

    def _batch(self, replays: int) -> list[float]:
        events = [_event() for _ in range(replays + 1)]
        events[0].record()
        for event in events[1:]:
            self._replay()
            event.record()
        events[-1].synchronize()
        return [
            float(first.elapsed_time(second)) * 1e3 / self.calls_per_replay
            for first, second in itertools.pairwise(events)
        ]

    def measure(self, *, warmup_s: float = 0.1, seconds: float = 0.25, min_samples: int = 11) -> Timing:
        """Replays for `warmup_s`, so that the clocks settle, then for about `seconds`; the median of the latter."""
        first = self._batch(2)
        replay_s = max(min(first) * self.calls_per_replay * 1e-6, 1e-6)
        self._batch(max(1, min(2000, math.ceil(warmup_s / replay_s))))
        began = time.time()
        # The first replay after a synchronisation also waits for its own launch: it is not counted.
        samples = self._batch(1 + max(min_samples, min(2000, math.ceil(seconds / replay_s))))[1:]
        method = "eager" if self._graph is None else "graph"
        return _timing(samples, self.calls_per_replay, method, began)


def time_cuda(calls: Sequence[Call], *, warmup_s: float = 0.1, seconds: float = 0.25, graph: bool = True) -> Timing:
    """GPU time of one call: median of CUDA-graph replays over the rotation `calls` (one callable per input set)."""
    return CudaTimer(calls, graph=graph).measure(warmup_s=warmup_s, seconds=seconds)


def time_cpu(call: Call, *, seconds: float = 0.5, min_samples: int = 3) -> Timing:
    """Wall time of one call on the CPU: median over about `seconds`, after one call that is not counted."""
    call()
    samples: list[float] = []
    began = time.time()
    while len(samples) < min_samples or sum(samples) < seconds * 1e6:
        start = time.perf_counter_ns()
        call()
        samples.append((time.perf_counter_ns() - start) * 1e-3)
    return _timing(samples, 1, "cpu", began)


def time_host(call: Call, *, calls: int = 2000, batch: int = 50) -> Timing:
    """CPU time of one eager call that only enqueues GPU work.

    Calls run in batches that are far too short to fill the launch queue, with a synchronisation between them that
    is not counted: so the GPU never holds the host back, and the wall time of a batch is the host's own.
    """
    cuda = torch.cuda.is_available()
    batch = max(1, min(batch, calls))
    samples: list[float] = []
    gc_was_enabled = gc.isenabled()
    began = time.time()
    try:
        gc.disable()
        for index in range(calls // batch + 2):
            start = time.perf_counter_ns()
            for _ in range(batch):
                call()
            elapsed = (time.perf_counter_ns() - start) * 1e-3 / batch
            if cuda:
                torch.cuda.synchronize()
            if index >= 2:
                samples.append(elapsed)
    finally:
        if gc_was_enabled:
            gc.enable()
    return _timing(samples, batch, "host", began)


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _stream() -> Any:
    return torch.cuda.Stream()  # type: ignore[no-untyped-call]


def _timing(samples: Sequence[float], calls_per_sample: int, method: str, began: float) -> Timing:
    return Timing(
        median_us=statistics.median(samples),
        min_us=min(samples),
        max_us=max(samples),
        samples=len(samples),
        calls_per_sample=calls_per_sample,
        method=method,
        began=began,
        ended=time.time(),
    )
