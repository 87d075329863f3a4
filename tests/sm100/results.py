"""Results of the emulated kernels in one library, FLASH_MLA_LIBRARY, into a file: `python tests/sm100/results.py FILE`.

The eager and the lazy emulation must write the same bytes. Every result is also checked against the reference.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
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
ROWS = ((576, torch.bfloat16), (512, torch.bfloat16), (576, torch.float16), (512, torch.float16))


def calls() -> Iterator[tuple[str, Any]]:
    """What is called, and with what."""
    selected = {"lengths": "token", "invalid": 0.2, "device": "cuda"}
    formats: list[dict[str, Any]] = [{"kv_format": known} for known in (KVFormat.V32, KVFormat.MODEL1, KVFormat.V41)]
    formats.append({"kv_format": KVFormat.V32_NO_ROPE})
    formats += [{"kv_format": KVFormat.BF16, "d_qk": d_qk} for d_qk in (576, 512)]
    for known in formats:
        for case in SELECTIONS:
            yield "decode", make_sparse_decode_inputs(2, 1, **selected, **known, **case)
    for known in formats:
        for case in PAIRED:
            yield "decode", make_sparse_decode_inputs(3, 2, **selected, **known, **case)
    both = {"kv_format": KVFormat.V41, "extra_format": KVFormat.V41_FP4, "extra_topk": 130}
    for h_q in (128, 64, 16):
        yield "decode", make_sparse_decode_inputs(2, 1, **selected, **both, h_q=h_q)
    for known in formats:
        for h_q in (66, 128, 20):
            yield "prefill", make_sparse_prefill_inputs(5, **selected, **known, h_q=h_q, topk=150, sink=True)
    for case in PAGED:
        for fp8 in (KVFormat.V32, KVFormat.MODEL1):
            yield "decode", make_dense_fp8_inputs(LENGTHS, fp8, device="cuda", **case)
        for d_qk, fp8_q in ((576, True), (512, False)):  # e4m3 with one scale
            yield "decode", make_dense_fp8_inputs(LENGTHS, None, device="cuda", d_qk=d_qk, fp8_q=fp8_q, **case)
        for d_qk, dtype in ROWS:
            yield "decode", make_dense_decode_inputs(LENGTHS, device="cuda", d_qk=d_qk, dtype=dtype, h_kv=2, **case)


def main(path: str) -> None:
    results: list[tuple[torch.Tensor, ...]] = []
    began = time.perf_counter()
    with backends.use("cuda"):
        for kind, inputs in calls():
            result = run_decode(inputs) if kind == "decode" else flash_mla_sparse_fwd(**inputs.call())
            check = check_decode if kind == "decode" else check_sparse_prefill
            check(inputs, result=result)
            results.append(tuple(tensor.cpu() for tensor in result))
    torch.save(results, path)
    print(f"{len(results)} cases are right, in {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main(sys.argv[1])
