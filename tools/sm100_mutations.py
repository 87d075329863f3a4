"""Mistakes in the kernels that their tests must find under emulation: changes of text."""

from __future__ import annotations

PRODUCTS = "sm100/sparse_attention/products.cuh"
MATH = "sm100/sparse_attention/math.cuh"
PRODUCER = "device/sparse/producer.cuh"
EPILOGUE = "device/sparse/epilogue.cuh"
ROW_PRODUCER = "sm100/sparse_attention/row_producer.cuh"

FEW_PRODUCTS = "sm100/sparse_attention_few_heads/products.cuh"
FEW_MATH = "sm100/sparse_attention_few_heads/math.cuh"
FEW_SOFTMAX = "device/few_rows/softmax.cuh"
FEW_PRODUCER = "device/few_rows/producer.cuh"

PAIRED_PRODUCTS = "sm100/sparse_attention_paired/products.cuh"
PAIRED_MATH = "sm100/sparse_attention_paired/math.cuh"
PAIRED_ROW_PRODUCER = "sm100/sparse_attention_paired/row_producer.cuh"
PAIRED_PRODUCER = "sm100/sparse_attention_paired/producer.cuh"
PAIRED_Q = "sm100/sparse_attention_paired/tensor_q.cuh"
FETCHED_ROWS = "device/sparse/fetched_rows.cuh"

BACKWARD = "sm100/dense_prefill_backward"

Change = tuple[str, str, str]  # in a file, this text, to that

# The emulated products are slower than any producer: whether they wait for one is not seen otherwise.
SLOW_PRODUCERS: Change = (PRODUCER, "publish_valid(slot);", "__nanosleep(100'000);\n        publish_valid(slot);")

SLOW_RING: Change = (
    FEW_PRODUCER,
    "if (entry.has_tile()) {\n        mbarrier_wait(",
    "if (entry.has_tile()) {\n        __nanosleep(100'000);\n        mbarrier_wait(",
)

# Of the CTA that does not issue, whose keys come behind those of the other.
SLOW_PEER: Change = (
    PAIRED_ROW_PRODUCER,
    "mbarrier_wait(shared_address(&storage_.scores_full[slot]), parity);",
    "mbarrier_wait(shared_address(&storage_.scores_full[slot]), parity);\n"
    "    for (int i = 0; i < 10; ++i) { __nanosleep(this->rank() == 1 ? 1'000'000 : 0); }",
)
# A wait for the keys of the next tile is one for these values too, so only the last tile of a list shows the mistake:
# where its values come later than its scores and probabilities.
SLOW_VALUES_OF_PEER: Change = (
    PAIRED_ROW_PRODUCER,
    "mbarrier_wait(shared_address(&storage_.values_empty[slot]), parity);",
    "mbarrier_wait(shared_address(&storage_.values_empty[slot]), parity);\n"
    "    for (int i = 0; i < 60; ++i) { __nanosleep(this->rank() == 1 ? 1'000'000 : 0); }",
)

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
    # Of caches with one scale.
    "no_scale_of_queries": [(EPILOGUE, "params.scale_log2 * of_query *", "params.scale_log2 *")],
    "no_scale_of_keys": [(EPILOGUE, "of_query * descale_of_output<kFormat>(params)", "of_query")],
    "no_scale_of_values": [(MATH, "output[0][i] *= descale;", "")],
    "rope_not_swizzled": [(PRODUCER, "((lane % kLanes * 2) ^ key) * 16", "(lane % kLanes * 2) * 16")],
    # For few heads.
    "few_no_wait_for_keys": [
        (FEW_PRODUCTS, "mbarrier_wait(shared_address(&storage_.k_full[slot]), filled_.parity(slot));", ""),
        SLOW_RING,
    ],
    "few_no_wait_for_probabilities": [
        (FEW_PRODUCTS, "mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));", "")
    ],
    "few_values_by_keys": [
        (FEW_PRODUCTS, "C::kRows, Major::kOuter, Major::kInner", "C::kRows, Major::kInner, Major::kInner")
    ],
    "few_offsets_swapped": [
        (
            FEW_PRODUCTS,
            "values.at(block * C::kSliceBytes + j * 16 * kSliceRowBytes)",
            "values.at(j * C::kSliceBytes + block * 16 * kSliceRowBytes)",
        )
    ],
    "few_no_wait_for_scores": [
        (FEW_MATH, "mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));", "")
    ],
    "few_no_wait_before_rescaling": [(FEW_MATH, "wait_for_values(tile - 1);", "")],
    "few_no_wait_at_the_end": [(FEW_MATH, "wait_for_values(num_tiles - 1);", "")],
    "few_no_wait_for_slot": [
        (FEW_PRODUCER, "mbarrier_wait(shared_address(&storage_.k_empty[entry.slot()]),", "static_cast<void>(")
    ],
    "few_probabilities_not_swizzled": [(FEW_SOFTMAX, "((unit ^ row % 8) * 16)", "(unit * 16)")],
    "few_warps_of_a_group_swizzled_alike": [
        (FEW_PRODUCER, "((lane_ % 4 * 2 + swapped) ^ this->first_key() % 8) * 16", "(lane_ % 4 * 2 + swapped) * 16")
    ],
    # Of pairs of CTAs.
    "paired_no_wait_for_peer": [
        (PAIRED_PRODUCTS, "mbarrier_wait(shared_address(&peer_full), parity);", ""),
        SLOW_PEER,
    ],
    "paired_no_wait_for_values_of_peer": [
        (
            PAIRED_PRODUCTS,
            "wait_for_both(storage_.values_full[slot], storage_.peer_values_full[slot], scored_.parity(slot));",
            "mbarrier_wait(shared_address(&storage_.values_full[slot]), scored_.parity(slot));",
        ),
        SLOW_VALUES_OF_PEER,
    ],
    "paired_no_wait_for_probabilities": [
        (
            PAIRED_PRODUCTS,
            "mbarrier_wait(shared_address(&storage_.probabilities_full[slot]), scored_.parity(slot));",
            "",
        )
    ],
    "paired_scores_told_to_one": [
        (
            PAIRED_PRODUCTS,
            "umma_commit_pair(shared_address(&storage_.scores_full[slot]));",
            "umma_commit(shared_address(&storage_.scores_full[slot]));",
        )
    ],
    "paired_other_leading_offset": [
        (
            PAIRED_PRODUCTS,
            "values(shared_address(storage_.values[0]), C::kSliceBytes)",
            "values(shared_address(storage_.values[0]), C::kKeySliceBytes)",
        )
    ],
    "paired_q_in_half_of_the_lanes": [
        (PAIRED_Q, "tmem_store_32x32(tensor_memory", "if (warp % 4 < 2) tmem_store_32x32(tensor_memory")
    ],
    "paired_rows_of_q_by_quarters": [(PAIRED_Q, "warp % 2 * 32 + lane", "warp % 4 / 2 * 32 + lane")],
    "paired_keys_of_one": [(PAIRED_ROW_PRODUCER, "this->rank() == 0 ? sources[0] : sources[1]", "sources[0]")],
    "paired_columns_of_one": [
        (PAIRED_ROW_PRODUCER, "this->rank() * C::kValueSlices * kSliceRowBytes", "C::kValueSlices * kSliceRowBytes")
    ],
    "paired_no_wait_for_slot_of_keys": [
        (PAIRED_ROW_PRODUCER, "mbarrier_wait(shared_address(&storage_.scores_full[slot]), parity);", "")
    ],
    "paired_no_wait_for_slot_of_values": [
        (PAIRED_ROW_PRODUCER, "mbarrier_wait(shared_address(&storage_.values_empty[slot]), parity);", "")
    ],
    "paired_no_wait_for_scores": [
        (PAIRED_MATH, "mbarrier_wait(shared_address(&storage_.scores_full[slot]), phases_.parity(slot));", "")
    ],
    "paired_no_wait_before_rescaling": [(PAIRED_MATH, "wait_for_values(tile - 1);", "")],
    "paired_no_wait_at_the_end": [(PAIRED_MATH, "wait_for_values(num_tiles - 1);", "")],
    "paired_halves_by_themselves": [(PAIRED_MATH, "scaled = fmaxf(scaled, other_half(0, scaled));", "")],
    "paired_mask_of_other_keys": [(PAIRED_MATH, "{valid.x >> 4 * half_, valid.y >> 4 * half_}", "{valid.x, valid.y}")],
    "paired_probabilities_not_swizzled": [(PAIRED_MATH, "((half_ * 4 + i) ^ row() % 8) * 16", "(half_ * 4 + i) * 16")],
    "paired_converted_keys_not_swizzled": [(PAIRED_PRODUCER, "(unit ^ row % 8 * 16)", "unit")],
    "paired_converted_values_of_own_keys_twice": [
        (FETCHED_ROWS, "(this->rank() ^ 1) * kOwnPasses", "this->rank() * kOwnPasses")
    ],
}

OF_ONE_SCALE = ("no_scale_of_queries", "no_scale_of_keys", "no_scale_of_values", "rope_not_swizzled")

# Changes that are no mistake: the same tests must pass.
HARMLESS: dict[str, list[Change]] = {
    "slow_producers": [SLOW_PRODUCERS],
    "slow_ring": [SLOW_RING],
    "slow_peer": [SLOW_PEER, SLOW_VALUES_OF_PEER],
}

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


def mutated_kernel(name: str) -> str:
    """The instantiation that shows the first change of a mutation."""
    where = ALL[name][0][0]
    if name in OF_ONE_SCALE:
        return "sm100/sparse_attention/inst/e4m3_576.cu"
    if where.startswith(BACKWARD):
        return f"{BACKWARD}/inst/bf16_192.cu"
    if where in (FEW_PRODUCTS, FEW_MATH, FEW_SOFTMAX, FEW_PRODUCER):
        return "sm100/sparse_attention_few_heads/inst/v32.cu"
    if where.startswith("sm100/sparse_attention_paired/") or where == FETCHED_ROWS:
        converts = where in (PAIRED_PRODUCER, FETCHED_ROWS)
        return f"sm100/sparse_attention_paired/inst/{'v32' if converts else 'bf16_576'}.cu"
    return f"sm100/sparse_attention/inst/{'bf16_576' if where == ROW_PRODUCER else 'v32'}.cu"


def mutated(text: str, file: str, changes: list[Change]) -> str:
    """The text of a file with those of the changes that are in it."""
    for where, before, after in changes:
        if where == file:
            if text.count(before) != 1:
                raise ValueError(f"not once in {file}: {before}")
            text = text.replace(before, after)
    return text
