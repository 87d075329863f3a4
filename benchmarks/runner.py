"""Runs shapes through ours and the peers, interleaved in one run on one GPU, and makes one record per shape."""

from __future__ import annotations

import datetime
import json
import os
import queue
import re
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from benchmarks.clock import Clock, query
from benchmarks.measuring import ROOT, progress, roofline
from benchmarks.shapes import (
    ITEM_SIZE,
    AnyShape,
    PrefillBackwardShape,
    PrefillShape,
    Shape,
    SparsePrefillBackwardShape,
    SparsePrefillShape,
    SparseShape,
)

HOST_SHAPE = Shape("host_h16_b1_64", 1, 1, 16, 64, varied=False)
SPARSE_PREFILL_HOST_SHAPE = SparsePrefillShape("host_sparse_prefill_h64", 1, 64, 64, 64)
PREFILL_HOST_SHAPE = PrefillShape("host_prefill_h4_b1", 1, 64, 4, causal=True)
SPARSE_HOST_SHAPE = SparseShape("host_sparse_v32_h64_b1", 1, 1, 64, "V32", 64, context=64)


@dataclass
class Contender:
    """One implementation under test: `kind` is its class, `label` its name in the records."""

    label: str
    kind: str
    path: str | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Child:
    """A worker process; started when first asked, and again after it died, but not after a start that failed."""

    def __init__(self, contender: Contender, device: str, logs: Path) -> None:
        self.contender = contender
        self.hello: dict[str, Any] = {}
        self._device = device
        self._log = logs / f"{contender.label}.log"
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._greeted = False

    def start(self) -> None:
        """Starts the process without waiting for it."""
        command = [sys.executable, str(ROOT / "benchmarks" / "worker.py"), "--implementation", self.contender.kind]
        command += ["--device", self._device]
        if self.contender.path is not None:
            command += ["--path", self.contender.path]
        self._answers, self._greeted = queue.Queue(), False
        with self._log.open("a") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **self.contender.environment},
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._read, args=(self._process.stdout, self._answers), daemon=True).start()

    @staticmethod
    def _read(stream: IO[str], answers: queue.Queue[dict[str, Any] | None]) -> None:
        for line in stream:
            answers.put(json.loads(line))
        answers.put(None)

    def ask(self, command: str, timeout: float, **arguments: Any) -> dict[str, Any]:
        """Sends one request and waits for its answer; a failure is an answer too, with ``ok`` False."""
        if self._process is None and self.hello.get("ok") is False:
            return self.hello
        if self._process is None:
            self.start()
        if not self._greeted:
            self.hello = self._answer(120.0)
            if not self.hello["ok"]:
                return self.hello
            self._greeted = True
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self._process.stdin.flush()
        except OSError:
            return self._failed("the process has died")
        return self._answer(timeout)

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            answer = self._answers.get(timeout=timeout)
        except queue.Empty:
            return self._failed(f"no answer within {timeout:.0f} s")
        if answer is None:
            return self._failed("the process has died")
        if answer.get("fatal"):
            self.close()
        return answer

    def _failed(self, reason: str) -> dict[str, Any]:
        self.close()
        tail = self._log.read_text().strip().splitlines()[-3:] if self._log.exists() else []
        return {"ok": False, "fatal": True, "error": " | ".join([reason, *tail])[:600]}

    def close(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None


@dataclass
class Options:
    """How to run: see ``python -m benchmarks run --help``."""

    device: str = "cuda"
    rounds: int = 6
    warmup_s: float = 0.02
    seconds: float = 0.04
    prepare_timeout_s: float = 120.0
    logs: Path = ROOT / "benchmarks" / "results" / "logs"


class Session:
    """One run: the children, the ceilings, and what is common to all records."""

    def __init__(self, contenders: list[Contender], options: Options) -> None:
        self.options = options
        options.logs.mkdir(parents=True, exist_ok=True)
        for log in options.logs.glob("*.log"):
            log.unlink()
        self.children = [Child(contender, options.device, options.logs) for contender in contenders]
        for child in self.children:
            child.start()
        self.clock = Clock(enabled=options.device.startswith("cuda"))
        self.ceilings: Any = None
        self.common: dict[str, Any] = {}

    def open(self, quick: bool = False, gather_rows: list[int] | None = None) -> None:
        """Waits for the children and measures the ceilings. Raises RuntimeError where ours does not start."""
        ours = self.children[0]
        answer = ours.ask("ceilings", 120.0, quick=quick, gather_rows=gather_rows or [])
        if not answer["ok"]:
            raise RuntimeError(f"{ours.contender.label}: {answer['error']}")
        gather = {int(size): gbps for size, gbps in answer["gather_gbps"].items()}
        self.ceilings = roofline.Ceilings(answer["gemm_tflops"], answer["read_gbps"], gather)
        for child in self.children[1:]:
            child.ask("release", 30.0)
        driver = query("driver_version") if self.options.device.startswith("cuda") else []
        now = datetime.datetime.now(datetime.timezone.utc)
        self.common = {
            "run": now.strftime("%Y%m%dT%H%M%SZ"),
            "gpu": ours.hello["gpu"],
            "driver": driver[0] if driver else None,
            "cuda": ours.hello["cuda"],
            "torch": ours.hello["torch"],
            "python": ours.hello["python"],
            "commit": commit(),
            "library": ours.hello["about"],
            "ceilings": {name: answer[name] for name in ("gemm_tflops", "read_gbps", "gather_gbps")},
        }

    def close(self) -> None:
        for child in self.children:
            child.close()
        self.clock.close()

    def run_shape(self, shape: AnyShape) -> dict[str, Any]:
        """Prepares every contender, times them in turn `rounds` times, and makes the record."""
        states = {child.contender.label: _prepare(child, shape, self.options) for child in self.children}
        for round_index in range(self.options.rounds):
            order = self.children if round_index % 2 == 0 else self.children[::-1]
            for child in order:
                self._time(child, states[child.contender.label])
        for child in self.children:
            if states[child.contender.label]["error"] is None:
                child.ask("release", 30.0)
        return self._record(shape, states)

    def _time(self, child: Child, state: dict[str, Any]) -> None:
        if state["error"] is not None:
            return
        answer = child.ask("time", 120.0, warmup_s=self.options.warmup_s, seconds=self.options.seconds)
        if not answer["ok"]:
            state["error"] = answer["error"]
            return
        state["rounds_us"].append(answer["median_us"])
        state["method"] = answer["method"]
        state["calls_per_replay"] = answer["calls_per_sample"]
        state["spans"].append((answer["began"], answer["ended"]))

    def _record(self, shape: AnyShape, states: dict[str, dict[str, Any]]) -> dict[str, Any]:
        labels = list(states)
        finished = {label: self._finish(state) for label, state in states.items()}
        ours = finished[labels[0]]
        work = _work(shape)
        floor_us = self.ceilings.floor_us(work)
        record = {
            "kind": "shape",
            **self.common,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "shape": shape.to_json(),
            "keys": shape.keys(),
            "flop": work.flop,
            "bytes": work.bytes,
            "floor_us": floor_us,
            "bound": self.ceilings.bound(work),
            **ours,
            **_rates(work, self.ceilings, floor_us, ours["time_us"]),
            "peers": {},
        }
        for label in labels[1:]:
            peer = finished[label]
            ratio = peer["time_us"] / ours["time_us"] if peer["time_us"] and ours["time_us"] else None
            child = next(child for child in self.children if child.contender.label == label)
            record["peers"][label] = {
                **peer,
                "ratio": ratio,
                "version": child.hello.get("about", {}).get("version"),
                "baseline": child.contender.kind == "ours",
            }
        return record

    def _finish(self, state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        spans = state.pop("spans")
        rounds = state["rounds_us"]
        state["time_us"] = statistics.median(rounds) if rounds and state["error"] is None else None
        state["clock"] = self.clock.between(spans)
        return state

    def run_host(self, shape: AnyShape, calls: int) -> list[dict[str, Any]]:
        """CPU time of one eager call, one record; every contender is measured twice, the lower median counts."""
        measured: dict[str, dict[str, Any]] = {}
        for _ in range(2):
            for child in self.children:
                label = child.contender.label
                answer = child.ask("host", 180.0, shape=shape.to_json(), calls=calls)
                if not answer["ok"]:
                    not_served = answer.get("not_served", False)
                    failed = {"time_us": None, "error": answer["error"], "not_served": not_served}
                    measured.setdefault(label, failed)
                elif (measured.get(label) or {}).get("time_us") is None or (
                    answer["median_us"] < measured[label]["time_us"]
                ):
                    measured[label] = {
                        "time_us": answer["median_us"],
                        "min_us": answer["min_us"],
                        "variant": answer["variant"],
                        "error": None,
                    }
        labels = list(measured)
        ours = measured[labels[0]]
        peers = {
            label: {**measured[label], "ratio": _ratio(measured[label]["time_us"], ours["time_us"])}
            for label in labels[1:]
        }
        record = {
            "kind": "host",
            **self.common,
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "shape": shape.to_json(),
            "calls": calls,
            **ours,
            "peers": peers,
        }
        return [record]


def _work(shape: AnyShape) -> Any:
    if isinstance(shape, SparseShape):
        return roofline.sparse_decode_work(
            shape.keys(),
            h_q=shape.h_q,
            d_qk=shape.d_qk,
            d_v=shape.d_v,
            bytes_per_token=shape.format.bytes_per_token,
            row_bytes=shape.format.row_bytes,
        )
    if isinstance(shape, SparsePrefillShape):
        work_of_rows = roofline.sparse_prefill_work
        if isinstance(shape, SparsePrefillBackwardShape):
            work_of_rows = roofline.sparse_prefill_backward_work
        return work_of_rows(
            shape.s_q,
            shape.s_kv,
            shape.topk,
            h_q=shape.h_q,
            d_qk=shape.d_qk,
            d_v=shape.d_v,
            bytes_per_token=shape.bytes_per_token,
        )
    if isinstance(shape, PrefillShape):
        work_of = roofline.dense_prefill_work
        if isinstance(shape, PrefillBackwardShape):
            work_of = roofline.dense_prefill_backward_work
        return work_of(
            shape.lengths(),
            h_q=shape.h_q,
            h_kv=shape.h_kv,
            d_qk=shape.d_qk,
            d_v=shape.d_v,
            causal=shape.causal,
            itemsize=ITEM_SIZE[shape.dtype],
        )
    return roofline.dense_decode_work(
        shape.lengths(),
        s_q=shape.s_q,
        h_q=shape.h_q,
        h_kv=shape.h_kv,
        d_qk=shape.d_qk,
        d_v=shape.d_v,
        causal=shape.causal,
        itemsize=ITEM_SIZE[shape.dtype],
    )


def _prepare(child: Child, shape: AnyShape, options: Options) -> dict[str, Any]:
    answer = child.ask("prepare", options.prepare_timeout_s, shape=shape.to_json())
    if not answer["ok"] and answer.get("fatal") and child.hello.get("ok"):
        answer = child.ask("prepare", options.prepare_timeout_s, shape=shape.to_json(), plain=True)
    state: dict[str, Any] = {"error": None, "rounds_us": [], "spans": [], "method": None}
    if not answer["ok"]:
        return {**state, "error": answer["error"], "not_served": answer.get("not_served", False)}
    kept = ("sets", "variant", "rel_error", "lse_error", "capture_error", "left_out")
    return {**state, "not_served": False, **{name: answer[name] for name in kept}}


def _rates(work: Any, ceilings: Any, floor_us: float, time_us: float | None) -> dict[str, Any]:
    if time_us is None:
        return dict.fromkeys(("tflops", "gbps", "share_of_gemm", "share_of_read", "share_of_floor"))
    tflops, gbps = work.tflops(time_us), work.gbps(time_us)
    return {
        "tflops": tflops,
        "gbps": gbps,
        "share_of_gemm": tflops / ceilings.gemm_tflops,
        "share_of_read": gbps / ceilings.memory_gbps(work),
        "share_of_floor": floor_us / time_us,
    }


def _ratio(theirs: float | None, ours: float | None) -> float | None:
    return theirs / ours if theirs and ours else None


def commit() -> str:
    """The commit under test: FLASH_MLA_COMMIT, or what git says, or ``unknown``."""
    given = os.environ.get("FLASH_MLA_COMMIT")
    if given:
        return given
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        dirty = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{head}-dirty" if dirty else head


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def gpu_slug(name: str) -> str:
    """``NVIDIA H100 80GB HBM3`` -> ``h100``; names without such a model number become words joined by ``-``."""
    model = re.search(r"\b([A-Z]{1,3}\d{2,4}[A-Z]?)\b", name)
    if model:
        return model.group(1).lower()
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def run(
    shapes: list[AnyShape], contenders: list[Contender], options: Options, out: Path, host_calls: int = 0
) -> tuple[Path, list[dict[str, Any]]]:
    """Runs everything, appends each record to ``out/<gpu>.jsonl`` as soon as it is there, returns path and records.

    The CPU time of a call is measured for the operations that `shapes` hold; for dense decode where there are none.
    """
    session = Session(contenders, options)
    records: list[dict[str, Any]] = []
    sparse = [shape for shape in shapes if isinstance(shape, SparseShape)]
    ops = {shape.op for shape in shapes} or {HOST_SHAPE.op}
    every_host: tuple[AnyShape, ...] = (HOST_SHAPE, SPARSE_HOST_SHAPE, PREFILL_HOST_SHAPE, SPARSE_PREFILL_HOST_SHAPE)
    hosts = [shape for shape in every_host if shape.op in ops and host_calls]
    try:
        with progress.Progress(len(shapes) + len(hosts), "benchmarks") as bar:
            bar.note("starting, measuring the ceilings")
            gather_rows = sorted({shape.format.row_bytes for shape in sparse})
            session.open(quick=not options.device.startswith("cuda"), gather_rows=gather_rows)
            out.mkdir(parents=True, exist_ok=True)
            path = out / f"{gpu_slug(session.common['gpu'])}.jsonl"
            jobs = [lambda shape=shape: [session.run_shape(shape)] for shape in shapes]
            jobs += [lambda shape=shape: session.run_host(shape, host_calls) for shape in hosts]
            for job in jobs:
                began = time.monotonic()
                made = job()
                with path.open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in made)
                records += made
                for record in made:
                    bar.step(f"{_line(record)} ({time.monotonic() - began:.1f} s)")
    finally:
        session.close()
    return path, records


def _line(record: dict[str, Any]) -> str:
    def part(label: str, entry: dict[str, Any]) -> str:
        if entry["time_us"] is None:
            return f"{label} - ({entry['error'][:80]})"
        ratio = f" ({entry['ratio']:.2f}x)" if entry.get("ratio") else ""
        return f"{label} {entry['time_us']:.1f} us{ratio}"

    parts = [part("ours", record), *(part(label, peer) for label, peer in record["peers"].items())]
    return f"{record['shape']['name']}: " + ", ".join(parts)
