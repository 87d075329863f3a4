#!/usr/bin/env python3
"""The README's support matrix, made from the kernel tables of the built library.

python tools/support_matrix.py            # print it
python tools/support_matrix.py --write    # put it into README.md
python tools/support_matrix.py --check    # fail if README.md says something else
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flash_mla import KernelSupport

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- support-matrix:begin -->", "<!-- support-matrix:end -->"
GPUS = {90: "SM90 (H100, H200, GH200)", 100: "SM100 (B200, GB200; not yet run there)"}
_CACHES = "BF16, V32, V32_NO_ROPE, MODEL1 (V4), V41, V41_FP4"
_ROWS = "BF16, V32, V32_NO_ROPE, MODEL1 (V4), V41 (+ V41_FP4)"
_DENSE_DECODE = [
    ("bfloat16, float16", "576, 512", "any", "any"),
    ("e4m3 with descale_k", "576, 512", "any", "any"),
    ("V32, V32_NO_ROPE, MODEL1 (V4), V41", "576, 512", "any", "1"),
]
# What Triton and the reference serve: dtypes or cache formats, d_qk, page sizes, h_kv.
TRITON = {
    "dense_decode": _DENSE_DECODE,
    "sparse_decode": [(_ROWS, "576, 512", "any", "1")],
    "sparse_prefill": [(_ROWS, "576, 512", "any", "1")],
    "dense_prefill": [("bfloat16, float16", "192, 128", "-", "any")],
    "kv_cache": [(_CACHES, "576, 512", "any", "1")],
}
REFERENCE = {
    "dense_decode": _DENSE_DECODE,
    "sparse_decode": [(_ROWS, "576, 512", "any", "1")],
    "sparse_prefill": [(_ROWS, "576, 512", "any", "1")],
    "sparse_prefill_backward": [(_ROWS, "576, 512", "any", "1")],
    "dense_prefill": [("bfloat16, float16", "192, 128", "-", "any")],
    "dense_prefill_backward": [("bfloat16, float16", "192, 128", "-", "any")],
    "kv_cache": [(_CACHES, "576, 512", "any", "1")],
}


def render() -> str:
    """The matrix as Markdown; needs the built library, no GPU."""
    from flash_mla import KVCacheProblem, KVFormat, kernels
    from flash_mla.backends import cuda

    rows: list[tuple[str, ...]] = []
    supported = kernels()
    for op, served in REFERENCE.items():
        for k in supported:
            if k.op == op and not k.reason:
                takes = (listed(k.dtypes), listed(k.d_qk), pages(k), listed(k.h_kv))
                rows.append((op, k.kernel, GPUS[k.compute_capability], *takes))
        if op == "kv_cache":
            for capability, gpu in GPUS.items():
                if cuda.why_not(KVCacheProblem("cuda", capability, KVFormat.V32, 64)) is None:
                    rows.append((op, "any_kv_cache", gpu, _CACHES, "576, 512", "any", "1"))
        rows += [(op, "triton", "SM80 and newer", *takes) for takes in TRITON.get(op, [])]
        rows += [(op, "reference (PyTorch)", "any device", *takes) for takes in served]
    return table(("op", "kernel", "GPU", "dtypes or cache formats", "d_qk", "page sizes", "h_kv"), rows)


def listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def pages(kernel: KernelSupport) -> str:
    sizes = kernel.page_block_sizes
    if sizes == (0,):
        return "-"
    # The table is asked about powers of two and about sizes that no special case would cover.
    return "any" if {1, 3, 1000} <= set(sizes) else listed(sizes)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def between_markers(text: str) -> str:
    return text.split(BEGIN)[1].split(END)[0].strip()


def main() -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    import flash_mla

    if not flash_mla.build_info():
        raise SystemExit("the library is not built: run tools/build_native.py")
    matrix = render()
    text = README.read_text()
    if arguments.write:
        README.write_text(text.replace(between_markers(text), matrix))
    elif arguments.check:
        return 0 if between_markers(text) == matrix else 1
    else:
        print(matrix)
    return 0


if __name__ == "__main__":
    sys.exit(main())
