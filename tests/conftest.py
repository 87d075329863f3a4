"""What the test files share: the backends that every test of an operator runs on."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

import flash_mla
from flash_mla import backends
from flash_mla.backends import cuda as cuda_backend


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
    return flash_mla.why_not("dense_decode", problem)


@dataclass(frozen=True)
class Target:
    """A backend under test and where its tensors live."""

    name: str
    device: str

    @property
    def is_cuda(self) -> bool:
        return self.name == "cuda"

    def require(self, op: str) -> None:
        """Skip the test where the backend has no kernels for an operation."""
        if self.is_cuda and op in cuda_backend.WITHOUT_KERNELS:
            pytest.skip(cuda_backend.no_kernels(op))

    def lengths(self, *small: int) -> list[int]:
        """`small` for the reference; more and longer requests where a GPU computes them."""
        if not self.is_cuda:
            return list(small)
        return [*small, 4097, 64, 1300, *(9 * length for length in small), 2048, 777, 1]


@pytest.fixture(params=["reference", pytest.param("cuda", marks=pytest.mark.gpu)])
def backend(request: pytest.FixtureRequest) -> Iterator[Target]:
    """Every backend in turn, with all others shut out. A test file names its operation `OP`, if not dense decode."""
    name = request.param
    if name == "cuda":
        reason = cuda_missing()
        if reason is not None:
            pytest.skip(reason)
    target = Target(name, "cuda" if name == "cuda" else "cpu")
    target.require(getattr(request.module, "OP", "dense_decode"))
    with backends.use(name):
        yield target


@pytest.fixture
def cuda() -> Iterator[Target]:
    """The CUDA backend alone, for tests marked gpu."""
    reason = cuda_missing()
    if reason is not None:
        pytest.skip(reason)
    with backends.use("cuda"):
        yield Target("cuda", "cuda")
