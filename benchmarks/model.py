"""A model of the portable backend on cards that nothing was measured on: from bytes, FLOP and the card's data sheet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.runner import gpu_slug

Record = dict[str, Any]


@dataclass(frozen=True)
class Card:
    """A data sheet: dense bfloat16 products with sums in float32, in TFLOPS, and device memory in GB/s."""

    name: str
    tflops: float
    gbps: float


MEASURED = {"h100": Card("H100 SXM", 989.0, 3350.0), "h200": Card("H200 SXM", 989.0, 4800.0)}
MODELLED = (Card("A100 80 GB SXM", 312.0, 2039.0), Card("RTX 4090", 165.2, 1008.0), Card("RTX 5090", 209.5, 1792.0))


def modelled_us(record: Record, card: Card, backend: str = "triton") -> float | None:
    """Time of the shape of `record` on `card`, or None where `backend` was not measured in it.

    The ceilings of the card are those that were measured, in the ratio of the data sheets; the backend is taken to
    come as close to the floor of the shape as it did where it was measured.
    """
    time_us, base = _time_us(record, backend), MEASURED.get(gpu_slug(record["gpu"]))
    if time_us is None or base is None:
        return None
    gbps = record["gbps"] / record["share_of_read"]  # of a stream, or of rows at random places
    compute = record["flop"] / (record["ceilings"]["gemm_tflops"] * card.tflops / base.tflops) * 1e-6
    memory = record["bytes"] / (gbps * card.gbps / base.gbps) * 1e-3
    return max(compute, memory) * time_us / record["floor_us"]


def rows(records: list[Record], backend: str = "triton") -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table: what was measured, and the model of every card."""
    head = ["shape", "CUDA (us)", "Triton (us)", "of the floor", *(f"{card.name} (model)" for card in MODELLED)]
    lines = []
    for record in records:
        time_us = _time_us(record, backend)
        if time_us is None:
            continue
        ours = record["time_us"]
        ratio = f" ({ours / time_us:.2f}x)" if ours else ""
        share = f"{100 * record['floor_us'] / time_us:.0f} % ({record['bound']})"
        cards = [modelled_us(record, card, backend) for card in MODELLED]
        lines.append(
            [
                record["shape"]["name"],
                _us(ours),
                f"{_us(time_us)}{ratio}",
                share,
                *(_us(modelled) for modelled in cards),
            ]
        )
    return head, lines


def _time_us(record: Record, backend: str) -> float | None:
    peer = record["peers"].get(backend)
    return peer["time_us"] if record["kind"] == "shape" and peer else None


def _us(time_us: float | None) -> str:
    if time_us is None:
        return "-"
    return f"{time_us:.0f}" if time_us >= 100 else f"{time_us:.1f}"
