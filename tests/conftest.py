"""What the test files share: the backends that every test of an operator runs on."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch

import flash_mla
from flash_mla import backends
from flash_mla.backends import cuda as cuda_backend
from flash_mla.backends import triton


def by_reference(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` served by the reference, whatever backend is under test."""

    @wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        with backends.use("reference"):
            return function(*args, **options)

    return call


# What tests of other operations write and read caches with.
append_kv_cache = by_reference(flash_mla.append_kv_cache)
dequantize_kv_cache = by_reference(flash_mla.dequantize_kv_cache)
quantize_kv_cache = by_reference(flash_mla.quantize_kv_cache)


def resident_growth(call: Callable[[], object]) -> int:
    """By how many bytes the peak of resident memory exceeds what there was before a call."""

    def status(field: str) -> int:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split(field + ":")[1].split()[0])

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        pytest.skip("the peak of resident memory cannot be reset here")
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device and the CUDA library")


def cuda_missing() -> str | None:
    """Why the CUDA backend cannot be tested here, or None."""
    if backends.cuda_missing is not None:
        return backends.cuda_missing
    if not torch.cuda.is_available():
        return "no CUDA device"
    problem = flash_mla.DenseDecodeProblem.of(
        torch.empty((1, 1, 16, 576), dtype=torch.bfloat16, device="cuda"),
        torch.empty((1, 64, 1, 576), dtype=torch.bfloat16, device="cuda"),
    )
    return backends.CUDA.why_not(problem)


def triton_missing() -> str | None:
    """Why the Triton backend cannot be tested here, or None: it needs a GPU, or TRITON_INTERPRET=1."""
    if torch.cuda.is_available() and not triton.config.interpreting():
        major, minor = torch.cuda.get_device_capability()
        return triton.why_not_on("cuda", 10 * major + minor)
    return triton.why_not_on("cpu", None)


@dataclass(frozen=True)
class Target:
    """A backend under test and where its tensors live."""

    name: str
    device: str

    @property
    def is_cuda(self) -> bool:
        """Whether it is the backend of CUDA kernels."""
        return self.name == "cuda"

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes: then tests are larger."""
        return self.device == "cuda"

    @property
    def emulated(self) -> bool:
        """Whether kernels of Blackwell run on an emulation (tests/sm100), whose products take milliseconds each: then
        tests are smaller where their work is not spread over all SMs.
        """
        return self.is_cuda and "FLASH_MLA_AS_BLACKWELL" in os.environ

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter computes: then tests are smaller."""
        return self.name == "triton" and not self.on_gpu

    def require(self, op: str) -> None:
        """Skip the test where the backend has no kernels for an operation."""
        if self.is_cuda:
            reason = cuda_backend.why_no_kernels(op)
            if reason is not None:
                pytest.skip(f"cuda: {reason}")

    def require_kernel(self, op: str, **call: Any) -> None:
        """Skip the test where the backend's kernels for an operation do not take a call."""
        if self.is_cuda:
            reason = flash_mla.why_not(op, **call)
            if reason is not None:
                pytest.skip(reason)

    def lengths(self, *small: int) -> list[int]:
        """`small` for the CPU; more and longer requests where a GPU computes them."""
        if not self.on_gpu:
            return list(small)
        if self.emulated:
            return [*small, 64, 1300, 777, 1]
        return [*small, 4097, 64, 1300, *(9 * length for length in small), 2048, 777, 1]


def target(name: str) -> Target:
    """The backend called `name` here; skips the test where it cannot run."""
    reason = {"cuda": cuda_missing, "triton": triton_missing}.get(name, lambda: None)()
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    on_gpu = name == "cuda" or (name == "triton" and torch.cuda.is_available() and not triton.config.interpreting())
    return Target(name, "cuda" if on_gpu else "cpu")


@pytest.fixture(params=["reference", "triton", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in turn, with all others shut out. A test file names its operation `OP`, if not dense decode."""
    chosen = target(request.param)
    chosen.require(getattr(request.module, "OP", "dense_decode"))
    with backends.use(chosen.name):
        yield chosen


@pytest.fixture(params=["cuda", "triton"])
def gpu(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend that runs on a GPU in turn, for tests marked gpu."""
    chosen = target(request.param)
    if not chosen.on_gpu:
        pytest.skip("triton: no CUDA device, or TRITON_INTERPRET=1")
    with backends.use(chosen.name):
        yield chosen


@pytest.fixture
def cuda() -> Iterator[Target]:
    """The CUDA backend alone, for tests marked gpu."""
    chosen = target("cuda")
    with backends.use("cuda"):
        yield chosen
