"""``python -m flash_mla``: what is this machine, which kernels serve it, and small runs, checked and timed."""

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

import flash_mla
from flash_mla.backends import REFERENCE, REGISTRY, cuda, select
from flash_mla.backends.capability import OPERATIONS
from flash_mla.kv_format import KVFormat
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillProblem
from flash_mla.testing import (
    Answer,
    Comparison,
    DenseDecodeInputs,
    SparseDecodeInputs,
    compare,
    expected_dense_decode,
    expected_sparse_decode,
    make_dense_decode_inputs,
    make_sparse_decode_inputs,
)
from flash_mla.testing.progress import Progress
from flash_mla.testing.roofline import Ceilings, Work, dense_decode_work, measure_ceilings, sparse_decode_work
from flash_mla.testing.timing import Timing, time_cpu, time_cuda

Inputs = DenseDecodeInputs | SparseDecodeInputs


@dataclass(frozen=True)
class DenseBatch:
    """A batch that is decoded: paged, one new token per request, causal, bf16."""

    lengths: tuple[int, ...]
    h_q: int
    page: int = 64

    def describe(self) -> str:
        """One line."""
        spread = f"{min(self.lengths):,} to {max(self.lengths):,} keys, {sum(self.lengths):,} in all"
        return f"{len(self.lengths)} requests of {spread}; {self.h_q} heads, pages of {self.page}, bf16"

    def work(self) -> Work:
        """The least that the call must do."""
        return dense_decode_work(self.lengths, s_q=1, h_q=self.h_q)

    def inputs(self, device: torch.device) -> Inputs:
        """The tensors of the call."""
        return make_dense_decode_inputs(self.lengths, h_q=self.h_q, page=self.page, device=device, causal=True)


@dataclass(frozen=True)
class SparseBatch:
    """A batch that is decoded: one new token per request, which selects `topk` rows of one cache of V32 pages."""

    requests: int
    topk: int
    h_q: int
    pages: int
    page: int = 64

    def describe(self) -> str:
        """One line."""
        selected = f"{self.requests} requests, each of {self.topk:,} out of {self.pages * self.page:,} cached tokens"
        return f"{selected}; {self.h_q} heads, pages of {self.page}, FP8 (V32)"

    def work(self) -> Work:
        """The least that the call must do."""
        return sparse_decode_work(self.requests * self.topk, h_q=self.h_q, bytes_per_token=_ROW_BYTES)

    def inputs(self, device: torch.device) -> Inputs:
        """The tensors of the call."""
        return make_sparse_decode_inputs(
            self.requests,
            h_q=self.h_q,
            topk=self.topk,
            kv_format=KVFormat.V32,
            page=self.page,
            num_blocks=self.pages,
            invalid=0.0,
            device=device,
        )


Batch = DenseBatch | SparseBatch
_ROW_BYTES = KVFormat.V32.layout.bytes_per_token


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; 0 when every answer was right."""
    parser = argparse.ArgumentParser(prog="python -m flash_mla", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--quick", action="store_true", help="a smaller batch")
    parser.add_argument("--device", help="cuda or cpu (default: cuda where there is one)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))

    say = _silent if options.json else print
    result = _machine(device)
    say(_describe_machine(result))
    ceilings = measure_ceilings(device, quick=options.quick, gather_rows=(_ROW_BYTES,))
    result |= {"ceilings": asdict(ceilings), "runs": {}}
    chosen: dict[str, Callable[[bool, bool], Batch]] = {"dense_decode": _choose_dense, "sparse_decode": _choose_sparse}
    for op, choose in chosen.items():
        batch = choose(result["operations"][op]["backend"] != "reference", options.quick)
        say(f"\n{op}: {batch.describe()}", flush=True)
        run = _decode(batch, device, ceilings, quick=options.quick)
        say(_describe_check(run["check"]), flush=True)
        result["runs"][op] = run
    say("", _table(result["runs"]), sep="\n")
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if all(run["check"]["passed"] for run in result["runs"].values()) else 1


def _silent(*_args: Any, **_kwargs: Any) -> None:
    pass


def _choose_dense(large: bool, quick: bool) -> DenseBatch:
    """Lengths as in service: many short, few long. The reference gets a batch that it can do in seconds."""
    if not large:
        return DenseBatch((2048, 700, 1, 65)[:2] if quick else (2048, 700, 1300, 65), h_q=16)
    draw = random.Random(0)
    count, longest = (64, 16384) if quick else (128, 40960)
    return DenseBatch(tuple(int(256 * (longest / 256) ** draw.random()) for _ in range(count)), h_q=128)


def _choose_sparse(large: bool, quick: bool) -> SparseBatch:
    """What is selected is far larger than an L2 cache, where a kernel serves the call."""
    if not large:
        return SparseBatch(requests=2 if quick else 4, topk=512, h_q=16, pages=32)
    return SparseBatch(requests=64 if quick else 128, topk=2048, h_q=128, pages=8192 if quick else 16384)


# ---- The machine.


def _machine(device: torch.device) -> dict[str, Any]:
    """Device, library, and for each operation the kernel that serves it and the reasons of those that do not."""
    build = flash_mla.build_info()
    return {
        "flash_mla": flash_mla.__version__,
        "torch": torch.__version__,
        "device": _device(device),
        "library": build or {"missing": cuda.missing()},
        "operations": {op: _operation(op, device) for op in OPERATIONS},
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": "CPU", "threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sms": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _operation(op: str, device: torch.device) -> dict[str, Any]:
    problem = _problem(op, device)
    table = cuda.kernel_table(problem)
    backend = select(problem).name
    kernel = next((name for name, reason in table.items() if reason == ""), None) if backend == "cuda" else None
    against = {name: reason for name, reason in table.items() if reason}
    if kernel is None and not against:
        against = {other.name: reason for other in REGISTRY if (reason := other.why_not(problem)) is not None}
    return {"backend": backend, "kernel": kernel, "why_not": against}


def _problem(op: str, device: torch.device) -> Problem:
    """A usual call, as the kernel tables see it: those of the demonstration."""
    if op == "kv_cache":
        return KVCacheProblem.of(torch.empty(1, 64, 1, 656, device=device, dtype=torch.uint8), KVFormat.V32)
    if op == "dense_prefill":
        rows = torch.empty(1, 128, 192, device=device, dtype=torch.bfloat16)
        return DensePrefillProblem.of(rows, rows, rows[..., :128], torch.zeros(2, device=device, dtype=torch.int32))
    q = torch.empty(1, 1, 128, 576, device=device, dtype=torch.bfloat16)
    rows, indices = q[:, :, :1], torch.zeros(1, 1, 2048, device=device, dtype=torch.int32)
    if op == "sparse_prefill":
        return SparsePrefillProblem.of(q[0], rows, indices)
    if op == "sparse_decode":
        k_cache = torch.empty(1, 64, 1, _ROW_BYTES, device=device, dtype=torch.uint8)
        return SparseDecodeProblem.of(q, k_cache, indices)
    return DenseDecodeProblem.of(q, rows)


def _describe_machine(result: dict[str, Any]) -> str:
    device, library = dict(result["device"]), result["library"]
    details = ", ".join(f"{name} {value}" for name, value in device.items() if name != "name")
    built = library.get("missing") or ", ".join(f"{name} {value}" for name, value in library.items())
    lines = [
        f"flash_mla  {result['flash_mla']}, torch {result['torch']}",
        f"device     {device['name']} ({details})",
        f"library    {built}",
        "",
        "operation        served by",
    ]
    for op, answer in result["operations"].items():
        server = answer["kernel"] or (f"{answer['backend']} backend" if answer["backend"] else "nothing")
        lines.append(f"{op:16s} {server}")
        lines += [f"{'':16s} - not {name}: {reason}" for name, reason in answer["why_not"].items()]
    return "\n".join(lines)


# ---- The run.


def _decode(batch: Batch, device: torch.device, ceilings: Ceilings, quick: bool) -> dict[str, Any]:
    """Decode the batch, check the answer, measure it."""
    inputs = batch.inputs(device)
    schedule, _ = flash_mla.get_mla_metadata()
    arguments = {**inputs.call(), "tile_scheduler_metadata": schedule}
    out, lse = flash_mla.flash_mla_with_kvcache(**arguments)
    check = _check(inputs, out, lse)

    backend = select(_problem_of(inputs)).name
    timing = _time(arguments, device, graph=backend != "reference", quick=quick)
    work, time_us = batch.work(), timing.median_us
    return {
        "backend": backend,
        "batch": asdict(batch),
        "check": check,
        "timing": asdict(timing),
        "time_us": time_us,
        "tflops": work.tflops(time_us),
        "gbps": work.gbps(time_us),
        **_shares(work, ceilings, time_us),
    }


def _problem_of(inputs: Inputs) -> Problem:
    if isinstance(inputs, SparseDecodeInputs):
        return SparseDecodeProblem.of(inputs.q, inputs.primary.cache, inputs.primary.indices)
    return DenseDecodeProblem.of(inputs.q, inputs.k_cache)


def _shares(work: Work, ceilings: Ceilings, time_us: float) -> dict[str, Any]:
    return {
        "gemm_tflops": ceilings.gemm_tflops,
        "memory_gbps": ceilings.memory_gbps(work),
        "share_of_gemm": work.tflops(time_us) / ceilings.gemm_tflops,
        "share_of_read": work.gbps(time_us) / ceilings.memory_gbps(work),
        "floor_us": ceilings.floor_us(work),
        "share_of_floor": ceilings.floor_us(work) / time_us,
        "bound": ceilings.bound(work),
    }


def _time(arguments: dict[str, Any], device: torch.device, graph: bool, quick: bool) -> Timing:
    def call() -> object:
        return flash_mla.flash_mla_with_kvcache(**arguments)

    seconds = 0.2 if quick else 1.0
    if device.type == "cuda":
        return time_cuda([call], seconds=seconds, graph=graph)
    return time_cpu(call, seconds=seconds)


def _expected(inputs: Inputs, rows: slice) -> Answer:
    if isinstance(inputs, SparseDecodeInputs):
        return expected_sparse_decode(inputs.rows(rows))
    return expected_dense_decode(inputs.rows(rows))


def _check(inputs: Inputs, out: torch.Tensor, lse: torch.Tensor) -> dict[str, Any]:
    """Compare every request with the float64 reference, one at a time."""
    b = inputs.q.shape[0]
    worst: dict[str, Comparison] = {}
    problems: list[str] = []
    with Progress(b, "checking against the reference", quiet_s=5.0) as bar:
        for request in range(b):
            rows = slice(request, request + 1)
            answer = _expected(inputs, rows)
            for comparison in (
                compare("out", out[rows], answer.out, answer.emulated_out),
                compare("lse", lse[rows], answer.lse, answer.emulated_lse),
            ):
                if comparison.problem is not None:
                    problems.append(f"request {request}: {comparison.problem}")
                name = comparison.name
                if name not in worst or comparison.worst_share > worst[name].worst_share:
                    worst[name] = comparison
            bar.step()
    return {
        "passed": not problems,
        "requests": b,
        "problems": problems[:10],
        "worst": {name: asdict(comparison) for name, comparison in worst.items()},
    }


def _describe_check(check: dict[str, Any]) -> str:
    if not check["passed"]:
        return "\n".join(["CHECK FAILED", *check["problems"]])
    parts = [
        f"{name} error {100 * worst['worst_share']:.0f} % of what is allowed" for name, worst in check["worst"].items()
    ]
    return f"check passed for {check['requests']} requests: largest {', '.join(parts)}"


def _table(runs: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'':42s} " + " ".join(f"{head:>12s}" for head in ("measured", "ceiling", "share"))]
    for op, run in runs.items():
        rows = [
            ("arithmetic (TFLOPS)", run["tflops"], run["gemm_tflops"], run["share_of_gemm"]),
            ("memory (GB/s)", run["gbps"], run["memory_gbps"], run["share_of_read"]),
            (f"time (us; {run['bound']}-bound)", run["time_us"], run["floor_us"], run["share_of_floor"]),
        ]
        for name, measured, ceiling, share in rows:
            label = f"{op.replace('_', ' ')}, {name}"
            lines.append(f"{label:42s} {_number(measured):>12s} {_number(ceiling):>12s} {100 * share:>10.1f} %")
    lines.append(
        "The ceilings were measured here: a large matrix product; a streaming read, for sparse decode a gather"
    )
    lines.append("of rows from random places; for time, the slower one.")
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    sys.exit(main())
