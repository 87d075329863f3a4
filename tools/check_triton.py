#!/usr/bin/env python3
"""Compile the Triton kernels for every architecture without such a GPU, and hold them against its limits.

python tools/check_triton.py                   # all: the tiles that are chosen on each card, every cache format
python tools/check_triton.py --quick           # every kernel once, for SM80, SM89 and SM120
python tools/check_triton.py --arch 89 --arch 120

Fails where a kernel does not compile, needs more shared memory than a block may have, or spills more than
MAX_SPILL bytes per thread. The register file is kept by the compiler: with 8 warps it never gives a thread more than
fits, and spills the rest.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted cannot be compiled

MAX_SPILL = 1536
"""Bytes per thread. What is the same for all requests of a part is computed once and waits in memory while the loop
over keys runs; that loop itself has next to no spills. A tile that is too large spills several times this.
"""


@dataclass(frozen=True)
class Card:
    """An architecture and the limits of its blocks."""

    capability: int
    example: str
    shared_memory: int
    num_sms: int


CARDS = [
    Card(80, "A100", 166912, 108),
    Card(86, "RTX 3090", 101376, 82),
    Card(89, "L40S", 101376, 142),
    Card(90, "H100", 232448, 132),
    Card(100, "B200", 232448, 148),
    Card(120, "RTX 5090", 101376, 170),
]
QUICK = (80, 89, 120)


@dataclass(frozen=True)
class Job:
    """One kernel to compile: its constants, and the types of its other arguments."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    types: dict[str, Any]
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Report:
    """What the compiler made of a job."""

    shared: int
    registers: int
    stack: int
    seconds: float


POINTERS = {
    "block_table": "*i32",
    "cu_seqlens_qo": "*i32",
    "cu_seqlens_kv": "*i32",
    "cache_seqlens": "*i32",
    "lengths": "*i32",
    "indices": "*i32",
    "length": "*i32",
    "extra_indices": "*i32",
    "extra_length": "*i32",
    "compacted": "*i32",
    "count": "*i32",
    "has_sink": "u1",
    "has_length": "u1",
    "has_extra_length": "u1",
    "schedule": "*i32",
    "num_splits": "*i32",
    "attn_sink": "*fp32",
    "descale": "*fp32",
    "lse": "*fp32",
    "partial_out": "*fp32",
    "partial_lse": "*fp32",
    "scale_log2": "fp32",
    "lse_unit": "fp32",
    "max_logits": "*fp32",
}


def jobs(card: Card, quick: bool) -> Iterator[Job]:
    """Every kernel as it would run on the card."""
    from flash_mla.backends.triton import config

    gpu = config.Gpu(card.capability, card.shared_memory, card.num_sms)
    yield append_job("BF16")
    yield append_job("MODEL1")
    yield dequantize_job(gpu, "MODEL1")
    yield combine_job()
    yield merge_job()
    yield plan_job(config.num_parts(gpu, 1, 16, 1)[0])
    yield compact_job()
    for rows, d_qk in ((128, 576),) if quick else ((16, 576), (32, 576), (128, 576), (16, 512), (128, 512)):
        yield dense_job(gpu, rows, d_qk, page=64)
    if not quick:
        yield dense_job(gpu, 16, 576, page=1)
        yield dense_job(gpu, 128, 576, page=64, fixed_cuts=True)
        yield dense_job(gpu, 16, 576, page=64, long=True)
        yield dense_job(gpu, 32, 576, page=64, long=True)
        for format in ("V32", "V32_NO_ROPE", "MODEL1", "V41", "E4M3_576", "E4M3_512"):
            for rows in (16, 128):
                yield dense_job(gpu, rows, 576 if format in ("V32", "E4M3_576") else 512, page=64, format=format)
        yield combine_job(fixed_cuts=True)
        for format in ("V32", "V32_NO_ROPE", "V41", "V41_FP4"):
            yield append_job(format)
            yield dequantize_job(gpu, format)
        yield append_job("V32", exact=True)
        yield sparse_job(gpu, 128, "V32", "NONE", fixed_cuts=True)
        yield prefill_job(gpu, 192, "bf16", causal=False)
        yield prefill_job(gpu, 128, "bf16", causal=True)
        yield prefill_job(gpu, 192, "fp16", causal=True)
    yield prefill_job(gpu, 192, "bf16", causal=True)
    pairs = [("V32", "NONE")] if quick else SPARSE_PAIRS
    for first, extra in pairs:
        for heads in (16,) if quick else (16, 32, 128):
            yield sparse_job(gpu, heads, first, extra)
            yield sparse_job(gpu, heads, first, extra, prefill=True)
    if not quick:
        for heads in (16, 32, 128):
            yield sparse_job(gpu, heads, "BF16_576", "BF16_576", prefill=True, wide_v=True)
            yield sparse_job(gpu, heads, "V32", "V32", prefill=True, wide_v=True)


SPARSE_PAIRS = [
    ("BF16_576", "NONE"),
    ("BF16_512", "BF16_512"),
    ("V32", "NONE"),
    ("V32_NO_ROPE", "NONE"),
    ("MODEL1", "MODEL1"),
    ("V41", "V41"),
    ("V41", "V41_FP4"),
]


def dense_job(
    gpu: Any,
    rows: int,
    d_qk: int,
    page: int,
    fixed_cuts: bool = False,
    long: bool = False,
    format: str = "NONE",
) -> Job:
    from flash_mla.backends.triton import config
    from flash_mla.backends.triton.dense_decode import dense_decode_kernel
    from flash_mla.backends.triton.dequant import Format

    tile = config.dense_tile(gpu, rows, d_qk, long)
    if format != "NONE":
        tile = config.sparse_tiles(gpu, rows, d_qk, Format[format].in_flight)[0]
    constants = {
        "FORMAT": int(Format[format]),
        "HARDWARE": config.converts_fp8(gpu),
        "DESCALE": format.startswith("E4M3"),
        "PAGE": page,
        "ROPE": d_qk > 512,
        "WIDE_ROWS": False,
        "CAUSAL": True,
        "HAS_SINK": True,
        "FIXED_CUTS": fixed_cuts,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    types = POINTERS | {"q": "*bf16", "k_cache": "*bf16" if format == "NONE" else "*u8", "out": "*bf16"}
    what = f"d{d_qk}" if format == "NONE" else format
    variant = " fixed cuts" if fixed_cuts else " long" if long else ""
    name = f"dense_decode {what} page {page} {tile.block_m}x{tile.block_n}{variant}"
    return Job(name, dense_decode_kernel, constants, types, tile.num_warps, tile.num_stages)


def sparse_job(
    gpu: Any,
    heads: int,
    first: str,
    extra: str,
    fixed_cuts: bool = False,
    prefill: bool = False,
    wide_v: bool = False,
) -> Job:
    from flash_mla.backends.triton import config
    from flash_mla.backends.triton.dequant import Format
    from flash_mla.backends.triton.sparse_decode import sparse_decode_kernel
    from flash_mla.backends.triton.sparse_prefill import sparse_prefill_kernel

    d_qk = 576 if first in ("V32", "BF16_576") else 512
    in_flight = max(Format[name].in_flight for name in (first, extra))
    tile = config.sparse_tiles(gpu, heads, d_qk, in_flight, wide_v)[0]
    constants = {
        "PAGE": 64 if first == "MODEL1" else 1,
        "EXTRA_PAGE": 64 if extra == "MODEL1" else 1,
        "FORMAT": int(Format[first]),
        "EXTRA_FORMAT": int(Format[extra]),
        "HARDWARE": config.converts_fp8(gpu),
        "ROPE": d_qk > 512,
        **({"WIDE_V": wide_v} if prefill else {"FIXED_CUTS": fixed_cuts}),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    types = POINTERS | {"q": "*bf16", "out": "*bf16"}
    types["cache"] = "*bf16" if first.startswith("BF16") else "*u8"
    types["extra_cache"] = "*bf16" if (first if extra == "NONE" else extra).startswith("BF16") else "*u8"
    formats = first if extra == "NONE" else f"{first} + {extra}"
    op, kernel = ("sparse_prefill", sparse_prefill_kernel) if prefill else ("sparse_decode", sparse_decode_kernel)
    variant = " fixed cuts" if fixed_cuts else " wide V" if wide_v else ""
    name = f"{op} {formats} {tile.block_m}x{tile.block_n}{variant}"
    return Job(name, kernel, constants, types, tile.num_warps, tile.num_stages)


def prefill_job(gpu: Any, d_qk: int, dtype: str, causal: bool) -> Job:
    from flash_mla.backends.triton import config
    from flash_mla.backends.triton.dense_prefill import dense_prefill_kernel

    tile = config.prefill_tiles(gpu, d_qk)[0]
    constants = {"ROPE": d_qk > 128, "CAUSAL": causal, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    types = POINTERS | dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}")
    name = f"dense_prefill d{d_qk} {dtype} {tile.block_m}x{tile.block_n}{' causal' if causal else ''}"
    return Job(name, dense_prefill_kernel, constants, types, tile.num_warps, tile.num_stages)


def append_job(format: str, exact: bool = False) -> Job:
    from flash_mla.backends.triton.dequant import Format
    from flash_mla.backends.triton.kv_cache import ROWS, append_kernel, append_rows_kernel
    from flash_mla.kv_format import KVFormat

    types = POINTERS | {"kv": "*bf16", "cache": "*bf16" if format == "BF16" else "*u8", "slot_mapping": "*i64"}
    if format == "BF16":
        constants = {"PAGE": 1, "D": 576, "COLUMNS": 1024, "ROWS": ROWS}
        return Job("append BF16", append_rows_kernel, constants, types, ROWS, 3)
    constants = {
        "PAGE": 64 if format == "MODEL1" else 1,
        "FORMAT": int(Format[format]),
        "GROUPS": 512 // KVFormat[format].layout.group,
        "EXACT": exact,
        "ROWS": ROWS,
    }
    return Job(f"append {format}{' exact' if exact else ''}", append_kernel, constants, types, ROWS, 3)


def dequantize_job(gpu: Any, format: str) -> Job:
    from flash_mla.backends.triton import config
    from flash_mla.backends.triton.dequant import Format
    from flash_mla.backends.triton.kv_cache import ROWS, dequantize_kernel

    constants = {
        "PAGE": 64 if format == "MODEL1" else 1,
        "FORMAT": int(Format[format]),
        "HARDWARE": config.converts_fp8(gpu),
        "ROWS": ROWS,
    }
    types = POINTERS | {"cache": "*u8", "values": "*bf16"}
    return Job(f"dequantize {format}", dequantize_kernel, constants, types, ROWS, 3)


def compact_job() -> Job:
    from flash_mla.backends.triton.sparse_decode import compact_kernel

    return Job("compact", compact_kernel, {"CHUNK": 1024}, POINTERS, 4, 3)


def combine_job(fixed_cuts: bool = False) -> Job:
    from flash_mla.backends.triton.combine import combine_kernel

    cuts = {"FIXED_CUTS": fixed_cuts, "BLOCKS_GIVEN": fixed_cuts}
    constants = {"HAS_SINK": True, "ROWS": 1, "SPLITS": 4} | cuts
    name = f"combine{' fixed cuts' if fixed_cuts else ''}"
    return Job(name, combine_kernel, constants, POINTERS | {"out": "*bf16"}, 4, 3)


def merge_job(parts: int = 3) -> Job:
    from flash_mla.backends.triton.merge import merge_kernel

    constants = {"PARTS": parts, "D": 512, "ROWS": 1, "COLUMNS": 512}
    types = {
        "outs": ("*bf16",) * parts,
        "lses": ("*fp32",) * parts,
        "out_strides": (("i32",) * 3,) * parts,
        "lse_strides": (("i32",) * 3,) * parts,
        "out": "*bf16",
        "lse": "*fp32",
    }
    return Job("merge", merge_kernel, constants, types, 4, 3)


def plan_job(num_parts: int) -> Job:
    from flash_mla.backends.triton.plan import LEAST_PART, MAX_TOLERANCE, plan_kernel

    constants = {"MAX_TOLERANCE": MAX_TOLERANCE, "LEAST_PART": LEAST_PART, "PARTS": 1 << num_parts.bit_length()}
    constants |= {"REQUESTS": 16, "CHUNK": 16}
    return Job("plan", plan_kernel, constants, POINTERS, 8, 3)


def compile_job(job: Job, capability: int) -> Report:
    """Compile with what a call's arguments usually are: addresses and strides that are multiples of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = job.kernel.arg_names
    signature = {name: "constexpr" if name in job.constants else job.types.get(name, "i32") for name in names}
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if isinstance(signature[name], str)
        and (
            signature[name].startswith("*")
            or re.fullmatch(r"stride_(q|k|v|out|extra)?_?(b|s|h|page|row|token)|d_v", name)
        )
    ]
    source = ASTSource(job.kernel, signature, dict(job.constants), {at: [["tt.divisibility", 16]] for at in aligned})
    options = {"num_warps": job.num_warps, "num_stages": job.num_stages, "enable_fp_fusion": True}
    began = time.monotonic()
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    seconds = time.monotonic() - began
    registers, stack = resources(compiled.asm["cubin"])
    return Report(compiled.metadata.shared, registers, stack, seconds)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread, from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise SystemExit(f"cuobjdump says nothing of registers: {text}")
    return int(match[1]), int(match[2])


def check(card: Card, job: Job) -> list[str]:
    """Compile, print a line, and return what is wrong."""
    where = f"sm{card.capability} {job.name}"
    try:
        report = compile_job(job, card.capability)
    except Exception as error:
        print(f"{where:62s} does not compile", flush=True)
        return [f"{where}: {type(error).__name__}: {error}"]
    wrong = []
    if report.shared > card.shared_memory:
        wrong.append(f"{where}: {report.shared} bytes of shared memory, {card.shared_memory} are there")
    if report.stack > MAX_SPILL:
        wrong.append(f"{where}: {report.stack} bytes of spills, at most {MAX_SPILL} are accepted")
    print(
        f"{where:62s} shared {report.shared:6d} of {card.shared_memory}  registers {report.registers:3d}"
        f"  spills {report.stack:4d}  {report.seconds:4.1f} s{'  WRONG' if wrong else ''}",
        flush=True,
    )
    return wrong


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="every kernel once, for three cards")
    parser.add_argument("--arch", type=int, action="append", help="compute capability, such as 89; may be repeated")
    parser.add_argument("--only", default="", help="jobs whose name contains this")
    arguments = parser.parse_args()
    wanted = arguments.arch or (QUICK if arguments.quick else [card.capability for card in CARDS])
    wrong: list[str] = []
    for card in CARDS:
        if card.capability in wanted:
            # On some cards different numbers of heads lead to one tile.
            for name, job in {job.name: job for job in jobs(card, arguments.quick)}.items():
                if arguments.only in name:
                    wrong += check(card, job)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
