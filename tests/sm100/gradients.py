"""Gradients of dense prefill for one library, FLASH_MLA_LIBRARY, into a file: `python tests/sm100/gradients.py FILE`.

The eager and the lazy emulation must write the same bytes. Every result is also checked against the reference.
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from flash_mla.testing import (
    check_dense_prefill_gradients,
    dense_prefill_gradients,
    make_dense_prefill_inputs,
    random_dense_prefill_gradients,
)

# Behind the last sequence stands what is no number, in the same tile.
CASES: list[dict[str, Any]] = [
    {"lengths": [(64, 128)], "h_q": 1, "h_kv": 1, "causal": False},
    {"lengths": [(70, 100), (5, 0), (0, 9), (130, 60)], "h_q": 4, "h_kv": 2, "causal": True},
    {"lengths": [(200, 300), (65, 131)], "h_q": 3, "h_kv": 1, "causal": True},
    # Scores so far below 0 that 1 / exp(lse), what an unseen key would weigh, is infinite.
    {"lengths": [(70, 1), (64, 2)], "h_q": 2, "h_kv": 1, "causal": False, "spread": 200.0},
]


def main(path: str) -> None:
    results = []
    for case in CASES:
        inputs = make_dense_prefill_inputs(**case, device="cuda")
        gradients = dense_prefill_gradients(inputs, *random_dense_prefill_gradients(inputs), deterministic=True)
        check_dense_prefill_gradients(inputs, result=gradients)
        results.append(tuple(gradient.cpu() for gradient in gradients))
    torch.save(results, path)
    print(f"{len(CASES)} cases are right")


if __name__ == "__main__":
    main(sys.argv[1])
