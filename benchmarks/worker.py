"""One implementation in its own process: reads requests as JSON lines on stdin, answers as JSON lines.

Started by file path (not ``-m``), so that the checkout is not on ``sys.path`` and the module name ``flash_mla`` can
be the peer's. Answers go to the original stdout; whatever a library prints goes to stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from benchmarks.implementations import AnyInputs, Implementation

ROOT = Path(__file__).resolve().parent.parent


def _arrange_imports(implementation: str, path: str | None) -> None:
    """Makes ``benchmarks`` importable without the checkout on sys.path, and puts the library to test first."""
    here, root = Path(__file__).resolve().parent, ROOT
    sys.path[:] = [entry for entry in sys.path if entry and Path(entry).resolve() not in (here, root)]
    if path is not None:
        sys.path.insert(0, str(Path(path).resolve()))
    elif implementation == "ours" and _checkout_is_built():
        sys.path.insert(0, str(root))
    elif implementation == "ours":
        sys.path.append(str(root))  # an installed flash_mla first; failing that the checkout's reference
    spec = importlib.util.spec_from_file_location(
        "benchmarks", here / "__init__.py", submodule_search_locations=[str(here)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = module
    spec.loader.exec_module(module)


def _checkout_is_built() -> bool:
    return "FLASH_MLA_LIBRARY" in os.environ or (ROOT / "flash_mla" / "libflash_mla.so").exists()


class Worker:
    """Holds the library and at most one prepared shape."""

    def __init__(self, name: str, device: str) -> None:
        import torch

        from benchmarks import implementations

        self.device: torch.device = torch.device(device)
        self.implementation: Implementation = implementations.IMPLEMENTATIONS[name]()
        self.inputs: AnyInputs | None = None
        self.measure: Any = None

    def hello(self) -> dict[str, Any]:
        import torch

        cuda = self.device.type == "cuda"
        return {
            "about": self.implementation.about(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda or "none",
            "python": sys.version.split()[0],
            "gpu": torch.cuda.get_device_name(self.device) if cuda else "CPU",
        }

    def ceilings(self, quick: bool, gather_rows: list[int]) -> dict[str, Any]:
        from benchmarks.measuring import roofline

        self.release()
        result = dataclasses.asdict(roofline.measure_ceilings(self.device, quick=quick, gather_rows=gather_rows))
        self.release()
        return result

    def prepare(self, shape: dict[str, Any], plain: bool = False) -> dict[str, Any]:
        """Builds inputs, checks the answer, captures the graph of the fastest variant (`plain`: of the first)."""
        from benchmarks.measuring import timing
        from benchmarks.shapes import from_json

        self.release()
        wanted = from_json(shape)
        sets = timing.rotation_sets(wanted.kv_bytes(), timing.l2_bytes(self.device))
        self.inputs = self.implementation.inputs(wanted, self.device, sets)
        chosen, failures = self._fastest(plain)
        return {"sets": sets, **chosen, "left_out": failures}

    def _fastest(self, plain: bool) -> tuple[dict[str, Any], dict[str, str]]:
        from benchmarks.implementations import NotServed

        assert self.inputs is not None
        best_us, best, failures, failed = float("inf"), None, {}, False
        makers = self.implementation.variants(self.inputs)[: 1 if plain else None]
        for index, make in enumerate(makers):
            try:
                variant = make()
                errors = self._check(variant)
                measure, capture_error = self._timer(variant)
                time_us = measure(0.01, 0.03).median_us if len(makers) > 1 else 0.0
            except (NotServed, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                if _breaks_cuda(error):
                    raise
                failures[f"variant {index}"] = _short(error)
                failed = failed or not isinstance(error, NotServed)
                continue
            if time_us < best_us:
                best_us = time_us
                best = {"variant": variant.name, **errors, "capture_error": capture_error}
                self.measure = measure
        if best is None:
            raise (RuntimeError if failed else NotServed)("; ".join(failures.values()))
        return best, failures

    def _check(self, variant: Any) -> dict[str, Any]:
        from benchmarks import inputs as checking

        assert self.inputs is not None
        errors: dict[str, Any] = {"rel_error": 0.0, "lse_error": None}
        for index in sorted({0, self.inputs.sets - 1}):
            out, lse = variant.calls[index]()[:2]
            error, lse_error = checking.check(self.inputs, index, out, lse)
            errors["rel_error"] = max(errors["rel_error"], error)
            if lse_error is not None:
                errors["lse_error"] = max(errors["lse_error"] or 0.0, lse_error)
        if errors["rel_error"] > checking.MAX_RELATIVE_ERROR or (errors["lse_error"] or 0) > checking.MAX_LSE_ERROR:
            raise RuntimeError(f"wrong answer: {errors} ({variant.name})")
        return errors

    def _timer(self, variant: Any) -> tuple[Any, str]:
        from benchmarks.measuring import timing

        if self.device.type == "cuda":
            timer = timing.CudaTimer(variant.calls)
            return lambda warmup, seconds: timer.measure(warmup_s=warmup, seconds=seconds), timer.capture_error
        return lambda warmup, seconds: timing.time_cpu(variant.calls[0], seconds=seconds), ""

    def call(self, shape: dict[str, Any], count: int) -> dict[str, Any]:
        """Plain eager calls of the first variant, checked afterwards."""
        from benchmarks.shapes import from_json

        self.inputs = self.implementation.inputs(from_json(shape), self.device, 1)
        variant = self.implementation.variants(self.inputs)[0]()
        for _ in range(count):
            variant.calls[0]()
        return self._check(variant)

    def time(self, warmup_s: float, seconds: float) -> dict[str, Any]:
        if self.measure is None:
            raise RuntimeError("nothing is prepared")
        return dataclasses.asdict(self.measure(warmup_s, seconds))

    def host(self, shape: dict[str, Any], calls: int) -> dict[str, Any]:
        """CPU time of one eager call, of the variant that costs the host least."""
        from benchmarks.implementations import NotServed
        from benchmarks.measuring import timing
        from benchmarks.shapes import from_json

        self.release()
        self.inputs = self.implementation.inputs(from_json(shape), self.device, 1)
        best, failures, failed = None, [], False
        for make in self.implementation.variants(self.inputs):
            try:
                variant = make()
                self._check(variant)
                result = timing.time_host(variant.calls[0], calls=calls)
            except (NotServed, TypeError, ValueError, NotImplementedError, RuntimeError) as error:
                if _breaks_cuda(error):
                    raise
                failures.append(_short(error))
                failed = failed or not isinstance(error, NotServed)
                continue
            if best is None or result.median_us < best["median_us"]:
                best = {**dataclasses.asdict(result), "variant": variant.name}
        if best is None:
            raise (RuntimeError if failed else NotServed)("; ".join(failures) or "no variant")
        return best

    def release(self) -> dict[str, Any]:
        """Frees inputs and graphs, so that the next implementation finds the memory."""
        import torch

        self.inputs, self.measure = None, None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        return {}


def _breaks_cuda(error: BaseException) -> bool:
    """Whether the CUDA context of this process is unusable after `error`."""
    text = str(error).lower()
    return "out of memory" not in text and ("cuda error" in text or "illegal memory" in text or "accelerator" in text)


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"


def _serve(worker: Worker, channel: Any) -> None:
    from benchmarks.implementations import NotServed

    def answer(reply: dict[str, Any]) -> None:
        channel.write(json.dumps(reply) + "\n")
        channel.flush()

    answer({"ok": True, **worker.hello()})
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        began = time.perf_counter()
        try:
            reply = {"ok": True, **getattr(worker, command)(**request)}
        except Exception as error:
            traceback.print_exc()
            fatal = _breaks_cuda(error)
            not_served = isinstance(error, NotServed) and not fatal
            reply = {"ok": False, "error": _short(error), "fatal": fatal, "not_served": not_served}
            with contextlib.suppress(Exception):
                worker.release()
        reply["wall_s"] = time.perf_counter() - began
        answer(reply)
        if reply.get("fatal"):
            return


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--implementation", required=True)
    parser.add_argument("--path")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _arrange_imports(options.implementation, options.path)
    try:
        worker = Worker(options.implementation, options.device)
    except Exception as error:
        traceback.print_exc()
        channel.write(json.dumps({"ok": False, "error": _short(error), "fatal": True}) + "\n")
        channel.flush()
        return
    _serve(worker, channel)


if __name__ == "__main__":
    main()
