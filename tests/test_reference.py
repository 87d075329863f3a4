"""The reference backend against a loop over single keys in float64: the definition, as plain as it can be written."""

import math

import pytest
import torch
from conftest import resident_growth
from torch import Tensor

from flash_mla import FlashMLASchedMeta, backends, flash_mla_with_kvcache
from flash_mla.backends import reference
from flash_mla.testing import DenseDecodeInputs, make_dense_decode_inputs


def naive(inputs: DenseDecodeInputs) -> tuple[Tensor, Tensor]:
    """out `[b, s_q, h_q, 512]` and lse `[b, h_q, s_q]`, float64, one key at a time."""
    q, cache = inputs.q.double(), inputs.k_cache
    b, s_q, h_q, d_qk = q.shape
    _, page, h_kv, _ = cache.shape
    out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64)
    lse = torch.full((b, h_q, s_q), math.inf, dtype=torch.float64)
    for request in range(b):
        length = int(inputs.cache_seqlens[request])
        for query in range(s_q):
            seen = length - (s_q - 1 - query) if inputs.causal else length
            for head in range(h_q):
                if seen <= 0:
                    continue
                rows, scores = [], []
                for position in range(seen):
                    block = int(inputs.block_table[request, position // page])
                    key = cache[block, position % page, head // (h_q // h_kv)].double()
                    rows.append(key)
                    scores.append(float(key @ q[request, query, head]) / math.sqrt(d_qk))
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights)
                value = sum(weight * row[:512] for weight, row in zip(weights, rows, strict=True)) / total
                lse[request, head, query] = top + math.log(total)
                if inputs.attn_sink is not None:
                    sink = float(inputs.attn_sink[head])
                    difference = sink - float(lse[request, head, query])
                    value = value / (1 + math.exp(difference)) if difference < 700 else value * 0
                out[request, query, head] = value
    return out, lse


def attend(inputs: DenseDecodeInputs, dtype: torch.dtype = torch.float64, **options: object) -> tuple[Tensor, Tensor]:
    return reference.attend(
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        softmax_scale=inputs.q.shape[-1] ** -0.5,
        causal=inputs.causal,
        attn_sink=inputs.attn_sink,
        compute_dtype=dtype,
        **options,
    )


def assert_same(actual: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float) -> None:
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, check_dtype=False)


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (3, 1), (4, 2), (6, 3), (8, 8)])
@pytest.mark.parametrize(("d_qk", "page", "s_q"), [(576, 16, 1), (512, 3, 3)])
def test_matches_the_naive_loop(d_qk: int, page: int, s_q: int, h_q: int, h_kv: int, causal: bool, sink: bool) -> None:
    inputs = make_dense_decode_inputs(
        [5, 0, 33, 2], s_q=s_q, h_q=h_q, h_kv=h_kv, d_qk=d_qk, page=page, causal=causal, sink=sink
    )
    wanted = naive(inputs)
    assert_same(attend(inputs), wanted, 1e-11)
    assert_same(attend(inputs, torch.float32), wanted, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_is_enough_for_half_precision_inputs(dtype: torch.dtype) -> None:
    inputs = make_dense_decode_inputs([700, 20], s_q=2, h_q=4, dtype=dtype, causal=True, spread=3.0)
    assert_same(attend(inputs, torch.float32), attend(inputs), 2e-5)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -1e30, 1e30, 3e38, 0.0])
def test_extreme_sinks(sink: float) -> None:
    inputs = make_dense_decode_inputs([9, 0, 1], h_q=2, page=4)
    without, _ = attend(inputs)
    inputs.attn_sink = torch.full((2,), sink)
    out, lse = attend(inputs)
    wanted = naive(inputs)
    assert_same((out, lse), wanted, 1e-11)
    if sink < 0:
        assert torch.equal(out, without)
    if sink > 1:
        assert not out.any()


def test_work_is_cut_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_dense_decode_inputs([130, 0, 64, 65, 7], s_q=5, h_q=4, page=16, causal=True, sink=True)
    whole = attend(inputs)
    monkeypatch.setattr(reference, "KEYS_PER_STEP", 7)
    monkeypatch.setattr(reference, "SCRATCH_ELEMENTS", 14_000)
    assert_same(attend(inputs), whole, 1e-12)
    assert_same(attend(inputs, one_request_at_a_time=True), whole, 1e-12)


def test_probabilities_are_rounded_only_when_asked() -> None:
    inputs = make_dense_decode_inputs([300], h_q=2)
    exact, rounded = attend(inputs, torch.float32), attend(inputs, torch.float32, probability_dtype=torch.bfloat16)
    difference = (exact[0] - rounded[0]).abs().max()
    assert 0 < difference < 1e-2
    assert torch.equal(exact[1], rounded[1])


def test_a_length_beyond_the_block_table_is_an_error() -> None:
    inputs = make_dense_decode_inputs([5], page=16)
    inputs.cache_seqlens.fill_(16 * inputs.block_table.shape[1] + 1)
    with pytest.raises(ValueError, match="cache_seqlens: wanted lengths from 0 to max_blocks"):
        attend(inputs)
    inputs.cache_seqlens.fill_(-1)
    with pytest.raises(ValueError, match=r"cache_seqlens: .* got -1"):
        attend(inputs)


def test_a_used_block_table_entry_that_names_no_page_is_an_error() -> None:
    inputs = make_dense_decode_inputs([5], page=16)
    inputs.cache_seqlens.fill_(17)
    with pytest.raises(ValueError, match="block_table: wanted entries below num_blocks"):
        attend(inputs)


def test_memory_of_a_long_request() -> None:
    """What is allocated does not follow the keys, here 151 MB as float32."""
    inputs = make_dense_decode_inputs([1 << 16], h_q=16)
    with backends.use("reference"):
        grown = resident_growth(
            lambda: flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=FlashMLASchedMeta())
        )
    assert grown < 64 << 20
