"""``python -m flash_mla``: what is this machine, which kernels serve it, and small runs, checked and timed."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

import flash_mla
from flash_mla.backends import CUDA, REGISTRY, cuda, select
from flash_mla.backends.capability import OPERATIONS
from flash_mla.demonstration import V32_ROW_BYTES, Job, Prepared, jobs
from flash_mla.kv_format import KVFormat
from flash_mla.problem import DenseDecodeProblem, Problem
from flash_mla.problem_kv_cache import KVCacheProblem
from flash_mla.problem_prefill import DensePrefillProblem
from flash_mla.problem_sparse import SparseDecodeProblem, SparsePrefillProblem
from flash_mla.testing import Comparison, compare
from flash_mla.testing.progress import Progress
from flash_mla.testing.roofline import Ceilings, Work, measure_ceilings
from flash_mla.testing.timing import Timing, time_cpu, time_cuda


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
    ceilings = measure_ceilings(device, quick=options.quick, gather_rows=(V32_ROW_BYTES,))
    result |= {"ceilings": asdict(ceilings), "runs": {}}
    served = {op: answer["backend"] != "reference" for op, answer in result["operations"].items()}
    for op, job in jobs(served, options.quick).items():
        say(f"\n{op}: {job.describe()}", flush=True)
        run = _run(job, device, ceilings, quick=options.quick)
        say(_describe_check(run["check"]), flush=True)
        result["runs"][op] = run
    say("", _table(result["runs"]), sep="\n")
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if all(run["check"]["passed"] for run in result["runs"].values()) else 1


def _silent(*_args: Any, **_kwargs: Any) -> None:
    pass


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
    if kernel is None:
        # The table says for each kernel of CUDA what the backend would say of all.
        others = [other for other in REGISTRY if other is not CUDA or not against]
        against |= {other.name: reason for other in others if (reason := other.why_not(problem)) is not None}
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
        k_cache = torch.empty(1, 64, 1, V32_ROW_BYTES, device=device, dtype=torch.uint8)
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


def _run(job: Job, device: torch.device, ceilings: Ceilings, quick: bool) -> dict[str, Any]:
    """Make the call, check the answer, measure it."""
    prepared = job.prepare(device)
    check = _check(prepared, *prepared.call())

    backend = select(prepared.problem).name
    timing = _time(prepared.call, device, graph=backend != "reference", quick=quick)
    work, time_us = job.work(), timing.median_us
    return {
        "backend": backend,
        "batch": asdict(job),
        "check": check,
        "timing": asdict(timing),
        "time_us": time_us,
        "tflops": work.tflops(time_us),
        "gbps": work.gbps(time_us),
        **_shares(work, ceilings, time_us),
    }


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


def _time(call: Callable[[], object], device: torch.device, graph: bool, quick: bool) -> Timing:
    seconds = 0.2 if quick else 1.0
    if device.type == "cuda":
        return time_cuda([call], seconds=seconds, graph=graph)
    return time_cpu(call, seconds=seconds)


def _check(prepared: Prepared, out: torch.Tensor, lse: torch.Tensor) -> dict[str, Any]:
    """Compare part by part with the float64 reference."""
    worst: dict[str, Comparison] = {}
    problems: list[str] = []
    with Progress(len(prepared.parts), "checking against the reference", quiet_s=5.0) as bar:
        for part in prepared.parts:
            answer = prepared.expected(part)
            given_out, given_lse = prepared.given(out, lse, part)
            for comparison in (
                compare("out", given_out, answer.out, answer.emulated_out),
                compare("lse", given_lse, answer.lse, answer.emulated_lse),
            ):
                if comparison.problem is not None:
                    problems.append(f"{prepared.part}[{part}]: {comparison.problem}")
                name = comparison.name
                if name not in worst or comparison.worst_share > worst[name].worst_share:
                    worst[name] = comparison
            bar.step()
    return {
        "passed": not problems,
        "parts": f"{len(prepared.parts)} {prepared.part}",
        "problems": problems[:10],
        "worst": {name: asdict(comparison) for name, comparison in worst.items()},
    }


def _describe_check(check: dict[str, Any]) -> str:
    if not check["passed"]:
        return "\n".join(["CHECK FAILED", *check["problems"]])
    parts = [
        f"{name} error {100 * worst['worst_share']:.0f} % of what is allowed" for name, worst in check["worst"].items()
    ]
    return f"check passed for {check['parts']}: largest {', '.join(parts)}"


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
