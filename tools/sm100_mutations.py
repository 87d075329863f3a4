"""Mistakes in the kernels that their tests must find under emulation: changes of text."""

from __future__ import annotations

PRODUCTS = "sm100/sparse_attention/products.cuh"
MATH = "sm100/sparse_attention/math.cuh"
PRODUCER = "device/sparse/producer.cuh"
ROW_PRODUCER = "sm100/sparse_attention/row_producer.cuh"

BACKWARD = "sm100/dense_prefill_backward"

Change = tuple[str, str, str]  # in a file, this text, to that

# The emulated products are slower than any producer: whether they wait for one is not seen otherwise.
SLOW_PRODUCERS: Change = (PRODUCER, "publish_valid(slot);", "__nanosleep(100'000);\n        publish_valid(slot);")

# Of sparse attention.
MISTAKES: dict[str, list[Change]] = {
    "no_wait_for_keys": [
        (PRODUCTS, "mbarrier_wait(shared_address(&storage_.k_full[slot][part]), filled_.parity(slot));", ""),
        SLOW_PRODUCERS,
    ],
    "no_wait_for_probabilities": [
        (PRODUCTS, "mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));", "")
    ],
    "other_leading_offset": [
        (
            PRODUCTS,
            "values(shared_address(storage_.k[0]), C::kSliceBytes)",
            "values(shared_address(storage_.k[0]), 8 * kSliceRowBytes)",
        )
    ],
    "no_wait_for_scores": [
        (MATH, "mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));", "")
    ],
    "no_wait_before_rescaling": [(MATH, "wait_for_values(tile - 1);", "")],
    "no_wait_for_store": [(MATH, "tmem_wait_store();", "")],
    "no_wait_for_slot": [
        (
            PRODUCER,
            "mbarrier_wait(shared_address(&storage_.k_empty[slot]), (kPaired ?",
            "static_cast<void>((kPaired ?",
        )
    ],
    "no_wait_for_slot_of_rows": [
        (ROW_PRODUCER, "mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);", "")
    ],
    "rows_not_swizzled": [(ROW_PRODUCER, "first ^ (2 * i % 8 * 16)", "first")],
}

# Changes that are no mistake: the same tests must pass.
HARMLESS: dict[str, list[Change]] = {"slow_producers": [SLOW_PRODUCERS]}

# Of the gradients of dense prefill.
GRADIENT_MISTAKES: dict[str, list[Change]] = {
    "rows_beyond_the_end": [
        (
            f"{BACKWARD}/producer.cuh",
            "token = item.first_query + tile * kBackwardQueryTile, rows = rows_of(item, tile);",
            "token = item.first_query + tile * kBackwardQueryTile, rows = kBackwardQueryTile;",
        )
    ],
    "rows_of_one_head": [(f"{BACKWARD}/mask.cuh", "get<0>(place_of(0)) % get<0>(item)", "get<0>(place_of(0))")],
    "no_wait_for_gradients": [(f"{BACKWARD}/adder.cuh", "pipeline.consumer_wait(state);", "")],
}

ALL = {**MISTAKES, **HARMLESS, **GRADIENT_MISTAKES}


def mutated_kernel(changes: list[Change]) -> str:
    """The instantiation that shows the first change."""
    if changes[0][0].startswith(BACKWARD):
        return "bf16_192.cu"
    return "bf16_576.cu" if changes[0][0] == ROW_PRODUCER else "v32.cu"


def mutated(text: str, file: str, changes: list[Change]) -> str:
    """The text of a file with those of the changes that are in it."""
    for where, before, after in changes:
        if where == file:
            if text.count(before) != 1:
                raise ValueError(f"not once in {file}: {before}")
            text = text.replace(before, after)
    return text
