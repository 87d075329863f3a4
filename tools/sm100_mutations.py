"""Mistakes in the kernels that their tests must find under emulation: one change of text each."""

from __future__ import annotations

PRODUCTS = "sm100/sparse_attention/products.cuh"
MATH = "sm100/sparse_attention/math.cuh"
PRODUCER = "device/sparse/producer.cuh"

# Of sparse attention.
MUTATIONS = {
    "no_wait_for_keys": (
        PRODUCTS,
        "mbarrier_wait(shared_address(&storage_.k_full[slot][part]), filled_.parity(slot));",
        "",
    ),
    "no_wait_for_probabilities": (
        PRODUCTS,
        "mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));",
        "",
    ),
    "other_leading_offset": (
        PRODUCTS,
        "values(shared_address(storage_.k[0]), C::kSliceBytes)",
        "values(shared_address(storage_.k[0]), 8 * kSliceRowBytes)",
    ),
    "no_wait_for_scores": (
        MATH,
        "mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));",
        "",
    ),
    "no_wait_before_rescaling": (MATH, "wait_for_values(tile - 1);", ""),
    "no_wait_for_store": (MATH, "tmem_wait_store();", ""),
    "no_wait_for_slot": (
        PRODUCER,
        "mbarrier_wait(shared_address(&storage_.k_empty[slot]), phases_.parity(slot) ^ 1);",
        "",
    ),
}

BACKWARD = "sm100/dense_prefill_backward"

# Of the gradients of dense prefill.
GRADIENT_MUTATIONS = {
    "rows_beyond_the_end": (
        f"{BACKWARD}/producer.cuh",
        "token = item.first_query + tile * kBackwardQueryTile, rows = rows_of(item, tile);",
        "token = item.first_query + tile * kBackwardQueryTile, rows = kBackwardQueryTile;",
    ),
    "rows_of_one_head": (f"{BACKWARD}/mask.cuh", "get<0>(place_of(0)) % get<0>(item)", "get<0>(place_of(0))"),
    "no_wait_for_gradients": (f"{BACKWARD}/adder.cuh", "pipeline.consumer_wait(state);", ""),
}
