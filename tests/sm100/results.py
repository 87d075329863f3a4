"""Results of the emulated kernels in one library, FLASH_MLA_LIBRARY, into a file: `python tests/sm100/results.py FILE`.

A second argument asks for the calls of one kernel alone: `sparse_attention_paired/v32`. The eager and the lazy
emulation must write the same bytes. Every result is also checked against the reference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import as_blackwell  # noqa: F401
import torch

from flash_mla import KVFormat, backends, flash_mla_sparse_fwd
from flash_mla.testing import (
    check_decode,
    check_sparse_prefill,
    make_dense_decode_inputs,
    make_dense_fp8_inputs,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
    run_decode,
)

SELECTIONS: list[dict[str, Any]] = [
    {"h_q": 64, "topk": 130},
    {"h_q": 128, "topk": 65, "extra_topk": 70, "sink": True},
    {"h_q": 3, "topk": 1, "sink": True},
    {"h_q": 64, "topk": 700, "extra_topk": 130},
    # Scores that outgrow the reference maximum again and again.
    {"h_q": 64, "topk": 700, "extra_topk": 130, "sink": True, "spread": 20.0},
    {"h_q": 16, "topk": 700, "extra_topk": 130, "sink": True, "spread": 20.0},
    {"h_q": 32, "topk": 700, "extra_topk": 130, "spread": 20.0},
]
# More of those for pairs of CTAs.
PAIRED: list[dict[str, Any]] = [
    {"h_q": 66, "topk": 1, "sink": True},
    {"h_q": 128, "topk": 64},
    {"h_q": 128, "topk": 700, "extra_topk": 130, "sink": True, "spread": 20.0},
    {"h_q": 100, "topk": 300, "extra_topk": 700, "spread": 20.0},
]
PAGED: list[dict[str, Any]] = [
    {"h_q": 64, "page": 64, "sink": True},
    {"h_q": 22, "s_q": 3, "page": 3, "causal": True, "spread": 20.0},
    {"h_q": 10, "s_q": 3, "page": 3, "causal": True, "spread": 20.0},
    {"h_q": 128, "page": 64, "sink": True},
    {"h_q": 46, "s_q": 3, "page": 3, "causal": True, "spread": 20.0},
]
LENGTHS = [0, 1, 700, 130]
# Query rows, of as many requests that a CTA has several lists of several tiles.
MANY_ROWS = (16, 40, 100)
MANY_LENGTHS = [700, 65] * 20
ROWS = ((576, torch.bfloat16), (512, torch.bfloat16), (576, torch.float16), (512, torch.float16))


@dataclass(frozen=True)
class Call:
    """A call of an op."""

    kind: str
    kernel: str
    """Whose it is: a folder of csrc/sm100, and an instantiation."""
    inputs: Callable[[], Any]


def call_of(kind: str, rows: int, keys: str, make: Callable[..., Any], *arguments: Any, **options: Any) -> Call:
    """A call on CUDA in which so many query rows share a list."""
    folder = "sparse_attention"
    if rows <= 32:
        folder += "_few_heads"
    elif rows > 64 and not keys.startswith("e4m3"):
        folder += "_paired"
    return Call(kind, f"{folder}/{keys}", partial(make, *arguments, device="cuda", **options))


def calls() -> Iterator[Call]:
    """What is called, and with what."""
    selected = {"lengths": "token", "invalid": 0.2}
    formats: list[tuple[str, dict[str, Any]]] = [
        (known.name.lower(), {"kv_format": known})
        for known in (KVFormat.V32, KVFormat.MODEL1, KVFormat.V41, KVFormat.V32_NO_ROPE)
    ]
    formats += [(f"bf16_{d_qk}", {"kv_format": KVFormat.BF16, "d_qk": d_qk}) for d_qk in (576, 512)]
    decode, prefill = partial(call_of, "decode"), partial(call_of, "prefill")
    for keys, known in formats:
        for case in SELECTIONS:
            yield decode(case["h_q"], keys, make_sparse_decode_inputs, 2, 1, **selected, **known, **case)
    for keys, known in formats:
        for case in PAIRED:
            yield decode(case["h_q"], keys, make_sparse_decode_inputs, 3, 2, **selected, **known, **case)
    both = {"kv_format": KVFormat.V41, "extra_format": KVFormat.V41_FP4, "extra_topk": 130}
    for h_q in (128, 64, 16):
        yield decode(h_q, "v41_fp4", make_sparse_decode_inputs, 2, 1, **selected, **both, h_q=h_q)
    for keys, known in formats:
        for h_q in (66, 128, 20, 40):
            options = {**selected, **known, "h_q": h_q, "topk": 150, "sink": True}
            yield prefill(h_q, keys, make_sparse_prefill_inputs, 5, **options)
    for case in PAGED:
        rows = case["h_q"] * case.get("s_q", 1)
        for fp8 in (KVFormat.V32, KVFormat.MODEL1):
            yield decode(rows, fp8.name.lower(), make_dense_fp8_inputs, LENGTHS, fp8, **case)
        for d_qk, fp8_q in ((576, True), (512, False)):  # e4m3 with one scale
            options = {"d_qk": d_qk, "fp8_q": fp8_q, **case}
            yield decode(rows, f"e4m3_{d_qk}", make_dense_fp8_inputs, LENGTHS, None, **options)
        for d_qk, dtype in ROWS:
            keys = f"{'bf16' if dtype == torch.bfloat16 else 'fp16'}_{d_qk}"
            options = {"d_qk": d_qk, "dtype": dtype, "h_kv": 2, **case}
            yield decode(rows // 2, keys, make_dense_decode_inputs, LENGTHS, **options)
    for rows in MANY_ROWS:
        case = {"h_q": rows, "sink": True, "spread": 20.0}
        for keys, known in [*formats, ("v41_fp4", both)]:
            options = {"extra_topk": 130, **selected, **known, **case, "topk": 700}
            yield decode(rows, keys, make_sparse_decode_inputs, 20, 2, **options)
        for d_qk in (576, 512):
            yield decode(rows, f"e4m3_{d_qk}", make_dense_fp8_inputs, MANY_LENGTHS, None, d_qk=d_qk, page=64, **case)
            options = {"d_qk": d_qk, "dtype": torch.float16, "page": 64, **case}
            yield decode(rows, f"fp16_{d_qk}", make_dense_decode_inputs, MANY_LENGTHS, **options)


def main(path: str, kernel: str | None = None) -> None:
    results: list[tuple[torch.Tensor, ...]] = []
    began = time.perf_counter()
    with backends.use("cuda"):
        for call in calls():
            if kernel not in (None, call.kernel):
                continue
            inputs = call.inputs()
            result = run_decode(inputs) if call.kind == "decode" else flash_mla_sparse_fwd(**inputs.call())
            check = check_decode if call.kind == "decode" else check_sparse_prefill
            check(inputs, result=result)
            results.append(tuple(tensor.cpu() for tensor in result))
    torch.save(results, path)
    print(f"{len(results)} cases are right, in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
