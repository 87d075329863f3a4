"""Results of sparse decode for one library, FLASH_MLA_LIBRARY, into a file: `python tests/sm100/results.py FILE`.

The eager and the lazy emulation must write the same bytes. Every result is also checked against the reference.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from flash_mla import KVFormat
from flash_mla.testing import check_decode, make_sparse_decode_inputs, run_decode

CASES: list[dict[str, Any]] = [
    {"h_q": h_q, "topk": topk, "extra_topk": extra, "sink": sink, "kv_format": known, "spread": spread}
    for known in (KVFormat.V32, KVFormat.MODEL1)
    for h_q, topk, extra, sink, spread in (
        (64, 130, 0, False, 1.0),
        (128, 65, 70, True, 1.0),
        (3, 1, 0, True, 1.0),
        (64, 700, 130, False, 1.0),
        (64, 700, 130, True, 20.0),  # scores that outgrow the reference maximum again and again
    )
]


def main(path: str) -> None:
    results = []
    for case in CASES:
        inputs = make_sparse_decode_inputs(2, 1, lengths="token", invalid=0.2, device="cuda", **case)
        out, lse = run_decode(inputs)
        check_decode(inputs, result=(out, lse))
        results.append((out.cpu(), lse.cpu()))
    torch.save(results, path)
    print(f"{len(CASES)} cases are right")


if __name__ == "__main__":
    main(sys.argv[1])
