"""The one comparison of a kernel's answer with the truth.

The yardstick is an emulation: the same mathematics in PyTorch with the kernel's dtypes and roundings. A kernel may err
twice as much as the emulation does, plus one rounding of its output dtype. Errors are judged row by row of the batch,
since a request of three keys has numbers, and errors, a hundred times those of one with thirty thousand.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

LSE_ROUNDING = 2e-5
"""Error of an lse allowed beside the emulation's, relative to `max(1, |lse|)`: float32 scores and sums in another
order.
"""


MIN_COSINE_ERROR = 1e-11
"""Allowed even for float32: exponentials and sums in float32 leave relative errors of a few 1e-6."""


@dataclass(frozen=True)
class Comparison:
    """How far an answer is from the truth."""

    name: str
    max_error: float
    """Largest absolute error."""
    max_error_of_emulation: float
    worst_share: float
    """Largest error as a share of what is allowed at its place; above 1 is a failure."""
    cosine_error: float
    """Largest `1 - cosine` of a vector of the last dimension; 0 for an lse."""
    cosine_allowed: float
    problem: str | None
    """None, or what is wrong and where."""

    @property
    def ok(self) -> bool:
        """Whether the answer is as good as it must be."""
        return self.problem is None


def compare(name: str, actual: Tensor, truth: Tensor, emulation: Tensor) -> Comparison:
    """Compare an output or an lse with the truth.

    Args:
        name: what it is called in messages; names that begin with "lse" or "max_logits" are compared as logarithms, and
            the cosines of those that begin with "d_" (gradients: differences of nearly equal numbers) with emulation's.
        actual: the answer.
        truth: float64 (or float32) and not rounded; same shape.
        emulation: PyTorch's answer with the same dtypes; same shape.

    Returns:
        The statistics; `problem` says what failed first: shape, dtype, the pattern of infinities and NaN (which must
        be exact), the error of an element, or the cosine of a row.
    """
    if actual.shape != truth.shape or actual.dtype != emulation.dtype:
        wanted, given = f"{emulation.dtype} {list(truth.shape)}", f"{actual.dtype} {list(actual.shape)}"
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, f"{name}: wanted {wanted}, got {given}")
    pattern = _first_pattern_difference(name, actual, truth)
    if pattern is not None or actual.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0, 0.0, 0.0, pattern)

    is_lse = name.startswith(("lse", "max_logits"))
    finite = truth.isfinite()
    truth64 = torch.where(finite, truth, 0.0).double()
    error = (torch.where(finite, actual, 0.0).double() - truth64).abs()
    emulated = (torch.where(emulation.isfinite() & finite, emulation, 0.0).double() - truth64).abs()
    allowed = _allowed_lse(truth64, emulated) if is_lse else _allowed_out(truth64, emulated, actual.dtype)
    share = error / allowed
    cosine_error, cosine_allowed = 0.0, 0.0
    problem = None
    if bool((share > 1).any()):
        problem = _describe(name, share > 1, actual, truth, allowed)
    if not is_lse:
        cosine_allowed = max(torch.finfo(actual.dtype).eps ** 2 / 4, MIN_COSINE_ERROR)
        losses = _cosine_error(torch.where(finite, actual, 0.0).double(), truth64)
        cosine_error = float(losses.max())
        if name.startswith("d_"):
            cosine_allowed += 4 * float(_cosine_error(emulation.double(), truth64).max())
        if problem is None and cosine_error > cosine_allowed:
            where = _first(losses > cosine_allowed)
            problem = f"{name}: 1 - cosine of row {where} is {float(losses[where]):.3g}, allowed {cosine_allowed:.3g}"
    return Comparison(
        name,
        float(error.max()),
        float(emulated.max()),
        float(share.max()),
        cosine_error,
        cosine_allowed,
        problem,
    )


def assert_close(name: str, actual: Tensor, truth: Tensor, emulation: Tensor) -> Comparison:
    """`compare`, and raise `AssertionError` with the first bad coordinate where the answer is not good enough."""
    comparison = compare(name, actual, truth, emulation)
    if comparison.problem is not None:
        raise AssertionError(comparison.problem)
    return comparison


def _first_pattern_difference(name: str, actual: Tensor, truth: Tensor) -> str | None:
    for kind, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differs = test(actual) != test(truth)
        if bool(differs.any()):
            where = _first(differs)
            given, wanted = float(actual[where]), float(truth[where])
            return f"{name}: wrong pattern of {kind}, first at {where}: got {given:.6g}, wanted {wanted:.6g}"
    return None


def _allowed_out(truth: Tensor, emulated: Tensor, dtype: torch.dtype) -> Tensor:
    """Twice the emulation's largest error in the same request and query (over heads and values), plus rounding.

    Rounding: half a unit in the last place of the row's largest value.
    """
    twice = 2 * emulated.amax(dim=(-2, -1), keepdim=True)
    rounding = truth.abs().amax(-1, keepdim=True) * (torch.finfo(dtype).eps / 2)
    return (twice + rounding).clamp(min=torch.finfo(dtype).tiny)


def _allowed_lse(truth: Tensor, emulated: Tensor) -> Tensor:
    return 2 * emulated.amax() + LSE_ROUNDING * truth.abs().clamp(min=1)


def _cosine_error(actual: Tensor, truth: Tensor) -> Tensor:
    """`1 - 2 x.y / (x.x + y.y)` over the last dimension; 0 where both are 0. Also sees a wrong length of the vector."""
    norms = (actual * actual + truth * truth).sum(-1)
    difference = ((actual - truth) ** 2).sum(-1)
    return torch.where(norms > 0, difference / norms.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(int(index) for index in mask.nonzero()[0])


def _describe(name: str, bad: Tensor, actual: Tensor, truth: Tensor, allowed: Tensor) -> str:
    where = _first(bad)
    limit = float(allowed.expand_as(bad)[where])
    return (
        f"{name}: {int(bad.sum())} of {bad.numel()} elements are wrong, first at {where}: "
        f"got {float(actual[where]):.6g}, wanted {float(truth[where]):.6g} within {limit:.3g}"
    )
