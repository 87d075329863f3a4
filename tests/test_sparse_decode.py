"""Sparse decode on every backend: formats, indices of every kind, traps, sinks, two caches, schedules, errors."""

import math
from dataclasses import replace
from typing import Literal

import pytest
import torch
from conftest import Target, append_kv_cache, dequantize_kv_cache, quantize_kv_cache, resident_growth
from test_dense_decode import assert_same_bits, guarded
from torch import Tensor

import flash_mla
from flash_mla import (
    FlashMLASchedMeta,
    KVFormat,
    UnsupportedError,
    backends,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flash_mla.testing import (
    SparseDecodeInputs,
    assert_close,
    check_decode,
    expected_sparse_decode,
    make_schedule,
    make_sparse_decode_inputs,
    run_decode,
)

OP = "sparse_decode"
PRIMARY_FORMATS = [known for known in KVFormat if known is not KVFormat.V41_FP4]
HEADS = (1, 3, 16, 63, 64, 128)
PAGES = (1, 2, 53, 64, 69, 256, 576)


def naive(inputs: SparseDecodeInputs) -> tuple[Tensor, Tensor]:
    """out `[b, s_q, h_q, 512]` and lse `[b, h_q, s_q]`, float64, one key at a time."""
    b, s_q, h_q, d_qk = inputs.q.shape
    out = torch.zeros(b, s_q, h_q, 512, dtype=torch.float64)
    lse = torch.full((b, h_q, s_q), math.inf, dtype=torch.float64)
    sides = [side for side in (inputs.primary, inputs.extra) if side is not None]
    values = [dequantize_kv_cache(side.cache, side.kv_format).flatten(0, 2).double() for side in sides]
    for request in range(b):
        for query in range(s_q):
            rows = []
            for side, cache in zip(sides, values, strict=True):
                topk = side.indices.shape[-1]
                count = topk
                if side.lengths is not None:
                    length = side.lengths[request]
                    count = int(length if length.dim() == 0 else length[query])
                for index in side.indices[request, query, :count].tolist():
                    if 0 <= index < cache.shape[0]:
                        rows.append(cache[index])
            for head in range(h_q if rows else 0):
                scores = [float(row @ inputs.q[request, query, head].double()) / math.sqrt(d_qk) for row in rows]
                top = max(scores)
                weights = [math.exp(score - top) for score in scores]
                total = sum(weights)
                lse[request, head, query] = top + math.log(total)
                if inputs.attn_sink is not None:
                    total += math.exp(min(float(inputs.attn_sink[head]) - top, 700))
                out[request, query, head] = sum(w * row[:512] for w, row in zip(weights, rows, strict=True)) / total
    return out, lse


# ---- The definition.


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("lengths", ["none", "request", "token"])
@pytest.mark.parametrize("known", PRIMARY_FORMATS)
def test_the_naive_loop(backend: Target, known: KVFormat, lengths: str, extra: bool) -> None:
    inputs = make_sparse_decode_inputs(
        2,
        2,
        h_q=3,
        topk=9,
        kv_format=known,
        page=4,
        lengths=lengths,
        invalid=0.3,
        sink=extra,
        extra_topk=5 if extra else 0,
        extra_format=KVFormat.V41_FP4 if known is KVFormat.V41 else None,
        extra_lengths="request",
    )
    out, lse = (result.cpu() for result in run_decode(replace_device(inputs, backend)))
    wanted_out, wanted_lse = naive(inputs)
    # What any backend may err by follows from rounded probabilities. The reference rounds none.
    answer = expected_sparse_decode(inputs)
    assert_close("out", out, wanted_out, answer.emulated_out)
    if backend.name == "reference":
        torch.testing.assert_close(out.double(), wanted_out, rtol=2**-7, atol=2e-3)
    torch.testing.assert_close(lse.double(), wanted_lse, rtol=2e-5, atol=2e-5)
    check_decode(inputs, result=(out, lse))


def replace_device(inputs: SparseDecodeInputs, backend: Target) -> SparseDecodeInputs:
    extra = None if inputs.extra is None else inputs.extra.to(backend.device)
    sink = None if inputs.attn_sink is None else inputs.attn_sink.to(backend.device)
    return SparseDecodeInputs(inputs.q.to(backend.device), inputs.primary.to(backend.device), extra, sink)


def test_the_truth_is_the_naive_loop() -> None:
    """In float64 the reference is the loop, not only close to it."""
    inputs = make_sparse_decode_inputs(2, 2, h_q=3, topk=9, extra_topk=7, page=4, lengths="token", sink=True)
    answer, (out, lse) = expected_sparse_decode(inputs), naive(inputs)
    torch.testing.assert_close(answer.out, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(answer.lse, lse, rtol=1e-11, atol=1e-11)


def test_work_is_cut_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    from flash_mla.backends import reference_sparse

    inputs = make_sparse_decode_inputs(4, 2, h_q=4, topk=150, extra_topk=33, lengths="token", sink=True)
    whole = expected_sparse_decode(inputs)
    monkeypatch.setattr(reference_sparse, "KEYS_PER_STEP", 7)
    monkeypatch.setattr(reference_sparse, "SCRATCH_ELEMENTS", 60_000)
    cut = expected_sparse_decode(inputs)
    torch.testing.assert_close(cut.out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.lse, whole.lse, rtol=1e-12, atol=1e-12)


# ---- Shapes.


@pytest.mark.parametrize("known", PRIMARY_FORMATS)
@pytest.mark.parametrize("h_q", HEADS)
def test_heads(backend: Target, h_q: int, known: KVFormat) -> None:
    inputs = make_sparse_decode_inputs(
        2, h_q=h_q, kv_format=known, topk=65, lengths="request", sink=h_q % 2 == 0, device=backend.device
    )
    check_decode(inputs)
    check_by_pairs_too(inputs)


def check_by_pairs_too(inputs: SparseDecodeInputs) -> None:
    """By default CTAs by themselves take a few requests of many heads. In this mode pairs of CTAs do."""
    if inputs.q.shape[2] > 64:
        check_decode(inputs, enable_batch_invariant=True)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("known", PRIMARY_FORMATS)
@pytest.mark.parametrize("h_q", [65, 100, 128])
def test_many_heads_of_many_requests(backend: Target, h_q: int, known: KVFormat, extra: bool) -> None:
    inputs = make_sparse_decode_inputs(
        20,
        h_q=h_q,
        kv_format=known,
        topk=65,
        lengths="request",
        extra_topk=70 if extra else 0,
        extra_format=KVFormat.V41_FP4 if known is KVFormat.V41 else None,
        extra_page=5,
        extra_lengths="request",
        invalid=0.3,
        sink=True,
        device=backend.device,
    )
    check_decode(inputs)


@pytest.mark.parametrize(("b", "s_q"), [(1, 1), (1, 65), (3, 2), (3, 7), (40, 1), (40, 3)])
def test_batches(backend: Target, b: int, s_q: int) -> None:
    inputs = make_sparse_decode_inputs(
        b, s_q, h_q=2, kv_format="MODEL1", topk=20, extra_topk=9, lengths="token", device=backend.device
    )
    check_decode(inputs)


@pytest.mark.parametrize("topk", [1, 2, 63, 64, 65, 128, 513, 2048])
def test_topk(backend: Target, topk: int) -> None:
    check_decode(make_sparse_decode_inputs(2, h_q=4, topk=topk, device=backend.device))
    check_decode(make_sparse_decode_inputs(2, h_q=4, topk=3, extra_topk=topk, device=backend.device))


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("known", [*PRIMARY_FORMATS, KVFormat.V41_FP4])
def test_pages(backend: Target, known: KVFormat, page: int) -> None:
    options = {"h_q": 4, "topk": 40, "num_blocks": max(2, 128 // page), "device": backend.device}
    if known is KVFormat.V41_FP4:
        options |= {"extra_format": known, "extra_topk": 40, "extra_page": page}
        check_decode(make_sparse_decode_inputs(2, kv_format=KVFormat.V41, **options))
    else:
        check_decode(make_sparse_decode_inputs(2, kv_format=known, page=page, **options))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5])
def test_scale(backend: Target, scale: float) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, sink=True, device=backend.device)
    inputs.softmax_scale = scale
    check_decode(inputs)


@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_peaked_scores(backend: Target, h_q: int) -> None:
    inputs = make_sparse_decode_inputs(2, 2, h_q=h_q, topk=200, spread=8.0, device=backend.device)
    check_decode(inputs)
    check_by_pairs_too(inputs)


@pytest.mark.parametrize("h_q", [16, 64, 128])
@pytest.mark.parametrize("stride", [1, 32])
def test_growing_scores(backend: Target, h_q: int, stride: int) -> None:
    """The largest score so far grows with nearly every key, or every 32 keys: what is relative to it goes along."""
    inputs = make_sparse_decode_inputs(1, 1, h_q=h_q, topk=320, spread=6.0, invalid=0.0)
    inputs.q[:] = inputs.q[:, :, :1]
    rows = dequantize_kv_cache(inputs.primary.cache, inputs.primary.kv_format).flatten(0, 2).float()
    indices = inputs.primary.indices
    order = (rows[indices.flatten().long()] @ inputs.q[0, 0, 0].float()).argsort()
    indices[:] = indices.flatten()[order].view(-1, stride).flip(1).reshape(indices.shape)
    inputs = replace_device(inputs, backend)
    check_decode(inputs)
    check_by_pairs_too(inputs)


@pytest.mark.parametrize("h_q", [4, 64, 128])
@pytest.mark.parametrize("known", PRIMARY_FORMATS)
def test_rows_and_columns_of_many_sizes(backend: Target, known: KVFormat, h_q: int) -> None:
    """Scales differ by 2^20 between rows and by as much within one."""
    inputs = make_sparse_decode_inputs(2, h_q=h_q, kv_format=known, octaves=10, device=backend.device)
    inputs.softmax_scale = 1e-8
    check_decode(inputs)
    check_by_pairs_too(inputs)


@pytest.mark.parametrize("magnitude", [-80, -20, 20, 80])
@pytest.mark.parametrize("h_q", [16, 64, 128])
@pytest.mark.parametrize("known", PRIMARY_FORMATS)
def test_values_of_any_magnitude_in_pieces(backend: Target, known: KVFormat, h_q: int, magnitude: int) -> None:
    """Of lists in pieces, which are joined, no number leaves its range in between."""
    inputs = make_sparse_decode_inputs(
        2,
        h_q=h_q if backend.on_gpu else 4,
        kv_format=known,
        topk=1500 if backend.on_gpu else 200,
        num_blocks=24,
        magnitude=magnitude,
        octaves=3,
        device=backend.device,
    )
    inputs.softmax_scale = 2.0**-magnitude / 64
    check_decode(inputs)
    check_by_pairs_too(inputs)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("known", ["V32", "MODEL1", "V41"])
def test_what_the_caches_may_be_declared_as(backend: Target, known: str, dtype: torch.dtype) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, kv_format=known, extra_topk=5, dtype=dtype, device=backend.device)
    assert inputs.primary.cache.dtype == dtype
    check_decode(inputs)


def test_the_format_is_read_from_the_bytes(backend: Target) -> None:
    """576 with 656 bytes is V32, 512 with 584 MODEL1, with 528 V41; the flag may be left out."""
    for known in ("V32", "MODEL1", "V41", "BF16"):
        inputs = make_sparse_decode_inputs(2, h_q=4, kv_format=known, device=backend.device)
        wanted = run_decode(inputs)
        call = {**inputs.call(), "tile_scheduler_metadata": FlashMLASchedMeta()}
        assert_same_bits(flash_mla_with_kvcache(**{**call, "kv_format": None}), wanted)
        assert_same_bits(flash_mla_with_kvcache(**{**call, "is_fp8_kvcache": False, "kv_format": known}), wanted)


# ---- Indices, lengths, and memory that may not be read.


def test_every_kind_of_invalid_index(backend: Target) -> None:
    """Anywhere in a row, also first, also alone."""
    inputs = make_sparse_decode_inputs(3, h_q=4, topk=12, invalid=0.0, device=backend.device)
    slots = 5 * 64
    bad = torch.tensor([-1, slots, slots + 1, 2**31 - 1, -(2**31), -slots], dtype=torch.int32, device=backend.device)
    clean = inputs.primary.indices.clone()
    inputs.primary.indices[0, 0, :6] = bad
    inputs.primary.indices[1, 0, 6:] = bad
    inputs.primary.indices[2, 0, ::2] = bad
    check_decode(inputs)
    first = flash_mla_with_kvcache(
        **{**inputs.call(), "indices": clean[:, :, 6:].contiguous()}, tile_scheduler_metadata=FlashMLASchedMeta()
    )
    torch.testing.assert_close(run_decode(inputs)[1][0], first[1][0], rtol=1e-5, atol=1e-5)


def test_no_valid_index(backend: Target) -> None:
    for sink in (False, True):
        inputs = make_sparse_decode_inputs(2, 2, h_q=5, invalid=1.1, sink=sink, extra_topk=3, device=backend.device)
        for options in ({}, {"enable_batch_invariant": True}):
            out, lse = run_decode(inputs, **options)
            assert not out.any()
            assert bool((lse == math.inf).all())


def test_duplicates_count_as_often_as_they_stand(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(1, h_q=4, topk=6, invalid=0.0, device=backend.device)
    inputs.primary.indices[0, 0] = inputs.primary.indices[0, 0, 0]
    out, lse = run_decode(inputs)
    check_decode(inputs, result=(out, lse))
    inputs.primary.indices = inputs.primary.indices[..., :1].contiguous()
    one_out, one_lse = run_decode(inputs)
    torch.testing.assert_close(lse, one_lse + math.log(6), rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(out, one_out, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("known", [*PRIMARY_FORMATS, KVFormat.V41_FP4])
def test_nothing_unreachable_matters(backend: Target, known: KVFormat) -> None:
    """The same bits whether what no index names is NaN or zeros, and whatever stands in lanes that do not count."""
    primary = KVFormat.V41 if known is KVFormat.V41_FP4 else known
    inputs = make_sparse_decode_inputs(
        3,
        2,
        h_q=4,
        kv_format=primary,
        lengths="token",
        extra_topk=11,
        extra_format=known,
        extra_lengths="request",
        device=backend.device,
    )
    trapped = run_decode(inputs)
    assert not bool(trapped[0].isnan().any())
    for side in (inputs.primary, inputs.extra):
        raw = side.cache.view(torch.uint8)
        if side.kv_format is KVFormat.BF16:
            side.cache.nan_to_num_(nan=0.0)
        else:
            reached = valid_slots(side)
            rows = dequantize_kv_cache(side.cache, side.kv_format).flatten(0, 2)[reached]
            raw.zero_()
            append_kv_cache(rows, side.cache, reached, side.kv_format)
            assert torch.equal(dequantize_kv_cache(side.cache, side.kv_format).flatten(0, 2)[reached], rows)
        lanes = torch.arange(side.indices.shape[-1], device=backend.device)
        lengths = side.lengths if side.lengths.dim() == 2 else side.lengths[:, None]
        side.indices.masked_fill_(lanes >= lengths[..., None], 1)
    assert_same_bits(run_decode(inputs), trapped)


def valid_slots(side: object) -> Tensor:
    """The slots that count, each once."""
    slots = side.cache.shape[0] * side.cache.shape[1]
    lengths = side.lengths if side.lengths.dim() == 2 else side.lengths[:, None]
    lanes = torch.arange(side.indices.shape[-1], device=side.indices.device)
    live = (lanes < lengths[..., None]) & (side.indices >= 0) & (side.indices < slots)
    return side.indices[live].unique().long()


def test_lengths_are_cut_to_what_there_is(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(3, h_q=4, topk=9, lengths=[9, 9, 0], device=backend.device)
    wanted = run_decode(inputs)
    inputs.primary.lengths = torch.tensor([10, 2**31 - 1, -5], dtype=torch.int32, device=backend.device)
    assert_same_bits(run_decode(inputs), wanted)


def test_lengths_by_request_and_by_token_agree(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(3, 2, h_q=4, lengths="request", device=backend.device)
    wanted = run_decode(inputs)
    inputs.primary.lengths = inputs.primary.lengths[:, None].expand(3, 2)
    assert_same_bits(run_decode(inputs), wanted)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -1e30, 1e30, 3e38, 0.0])
def test_extreme_sinks(backend: Target, sink: float) -> None:
    inputs = make_sparse_decode_inputs(2, 2, h_q=4, lengths="token", extra_topk=4, device=backend.device)
    without = run_decode(inputs)
    inputs.attn_sink = torch.full((4,), sink, device=backend.device)
    out, lse = run_decode(inputs)
    check_decode(inputs, result=(out, lse))
    assert torch.equal(lse, without[1])
    if sink < 0:
        assert torch.equal(out, without[0])
    if sink > 1:
        assert not out.any()


# ---- Two caches.


@pytest.mark.parametrize("known", PRIMARY_FORMATS)
def test_two_caches_make_one_softmax(backend: Target, known: KVFormat) -> None:
    """Either order; and together they are merge_attention_states of the two."""
    inputs = make_sparse_decode_inputs(
        3, h_q=4, kv_format=known, topk=33, extra_topk=70, extra_page=1, lengths="request", device=backend.device
    )
    out, lse = run_decode(inputs)
    check_decode(inputs, result=(out, lse))
    swapped = replace(inputs, primary=inputs.extra, extra=inputs.primary)
    check_decode(inputs, result=run_decode(swapped))
    parts = [run_decode(replace(inputs, primary=side, extra=None)) for side in (inputs.primary, inputs.extra)]
    _, merged_lse = flash_mla.merge_attention_states(*map(list, zip(*parts, strict=True)))
    torch.testing.assert_close(merged_lse, lse, rtol=1e-5, atol=1e-5)


def test_a_primary_of_length_zero(backend: Target) -> None:
    """LMDeploy: only the extra cache has keys."""
    inputs = make_sparse_decode_inputs(
        3, h_q=8, kv_format="MODEL1", topk=64, lengths=[0, 0, 0], extra_topk=20, device=backend.device
    )
    out, lse = run_decode(inputs)
    check_decode(inputs, result=(out, lse))
    assert bool(lse.isfinite().all())
    alone = run_decode(replace(inputs, primary=inputs.extra, extra=None))
    torch.testing.assert_close(out, alone[0], rtol=2**-7, atol=1e-3)


# ---- Bits.


def test_repeated_calls_give_the_same_bits(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(5, 2, h_q=16, topk=300, lengths="token", extra_topk=30, device=backend.device)
    wanted = run_decode(inputs)
    for _ in range(3):
        assert_same_bits(run_decode(inputs), wanted)


def test_batch_invariance(backend: Target) -> None:
    """A query's bits depend on its own keys alone: not on the batch, nor on padding with indices of nothing."""
    inputs = make_sparse_decode_inputs(
        4, 2, h_q=16, topk=200, lengths="token", extra_topk=30, sink=True, device=backend.device
    )
    options = {"enable_batch_invariant": True}
    out, lse = run_decode(inputs, **options)
    check_decode(inputs, result=(out, lse))
    for request in (0, 3):
        rows = slice(request, request + 1)
        alone = SparseDecodeInputs(
            inputs.q[rows],
            cut(inputs.primary, rows),
            cut(inputs.extra, rows),
            inputs.attn_sink,
        )
        assert_same_bits(run_decode(alone, **options), (out[rows], lse[rows]))
        for side in (alone.primary, alone.extra):
            b, s_q, topk = side.indices.shape
            padded = torch.full((b, s_q, 3 * topk), -1, dtype=torch.int32, device=backend.device)
            padded[..., topk : 2 * topk] = side.indices
            if side.lengths is not None:
                lengths = side.lengths if side.lengths.dim() == 2 else side.lengths[:, None]
                dead = torch.arange(topk, device=backend.device) >= lengths[..., None]
                padded[..., topk : 2 * topk].masked_fill_(dead, -1)
            side.indices, side.lengths = padded, None
        assert_same_bits(run_decode(alone, **options), (out[rows], lse[rows]))


@pytest.mark.parametrize("h_q", [4, 65])
def test_batch_invariance_of_long_lists(backend: Target, h_q: int) -> None:
    """Lists of several pieces: the same bits alone, and with indices of nothing between those that count."""
    inputs = make_sparse_decode_inputs(
        3, 2, h_q=h_q, topk=1500, kv_format="MODEL1", extra_topk=700, lengths="token", device=backend.device
    )
    options = {"enable_batch_invariant": True}
    out, lse = run_decode(inputs, **options)
    check_decode(inputs, result=(out, lse))
    rows = slice(2, 3)
    alone = SparseDecodeInputs(inputs.q[rows], cut(inputs.primary, rows), cut(inputs.extra, rows), None)
    for side in (alone.primary, alone.extra):
        topk = side.indices.shape[2]
        indices = side.indices
        if side.lengths is not None:
            lengths = side.lengths if side.lengths.dim() == 2 else side.lengths[:, None]
            indices = indices.masked_fill(torch.arange(topk, device=backend.device) >= lengths[..., None], -1)
        spread = torch.full((1, 2, 3 * topk), -1, dtype=torch.int32, device=backend.device)
        spread[..., 1::3], spread[..., 2::3] = indices, 2**31 - 1
        side.indices, side.lengths = spread, None
    assert_same_bits(run_decode(alone, **options), (out[rows], lse[rows]))


def cut(side: object, rows: slice) -> object:
    return replace(side, indices=side.indices[rows], lengths=None if side.lengths is None else side.lengths[rows])


# ---- Outputs and inputs in memory.


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_given_outputs(backend: Target, batch_invariant: bool) -> None:
    inputs = make_sparse_decode_inputs(3, 2, h_q=9, lengths="token", sink=True, device=backend.device)
    out, out_bytes = guarded((3, 2, 9, 512), torch.bfloat16, backend.device)
    lse, lse_bytes = guarded((3, 9, 2), torch.float32, backend.device)
    options = {"enable_batch_invariant": batch_invariant}
    result = run_decode(inputs, out=out, lse=lse, **options)
    assert result[0] is out
    assert result[1] is lse
    for buffer in (out_bytes, lse_bytes):
        assert bool((buffer[:4096] == 0xA5).all())
        assert bool((buffer[-4096:] == 0xA5).all())
    assert_same_bits(result, run_decode(inputs, **options))
    only_out = run_decode(inputs, out=torch.full_like(out, math.nan), **options)
    only_lse = run_decode(inputs, lse=torch.full_like(lse, math.nan), **options)
    assert_same_bits(only_out, result)
    assert_same_bits(only_lse, result)
    check_decode(inputs, result=result)


def test_strided_tensors(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(3, 2, h_q=4, lengths="request", device=backend.device)
    wanted = run_decode(inputs)
    room = torch.full((3, 3, 6, 640), math.nan, dtype=torch.bfloat16, device=backend.device)
    room[:, :2, 1:5, :576] = inputs.q
    index_room = torch.full((3, 3, 100), 7, dtype=torch.int32, device=backend.device)
    index_room[:, 1:, :70] = inputs.primary.indices
    length_room = torch.full((3, 2), 5, dtype=torch.int32, device=backend.device)
    length_room[:, 0] = inputs.primary.lengths
    inputs.q = room[:, :2, 1:5, :576]
    inputs.primary = replace(inputs.primary, indices=index_room[:, 1:, :70], lengths=length_room[:, 0])
    assert_same_bits(run_decode(inputs), wanted)


def test_memory_of_a_long_call() -> None:
    """One request of many tokens: what is allocated does not follow tokens times topk, here 1.2 GB as float32."""
    s_q, topk = 2000, 256
    cache = quantize_kv_cache(torch.randn(64, 576).to(torch.bfloat16), "V32", 64)
    q = torch.randn(1, s_q, 1, 576).to(torch.bfloat16)
    indices = torch.randint(0, 64, (1, s_q, topk), dtype=torch.int32)
    with backends.use("reference"):
        grown = resident_growth(
            lambda: flash_mla_with_kvcache(
                q, cache, None, None, 512, FlashMLASchedMeta(), indices=indices, is_fp8_kvcache=True
            )
        )
    assert grown < 600 << 20


def test_offsets_beyond_32_bits(backend: Target) -> None:
    """A cache of 4.6 GB, of which a few pages are ever touched."""
    num_blocks, page = 110_000, 64
    cache = torch.empty((num_blocks, page, 1, 656), dtype=torch.uint8, device=backend.device)
    rows = torch.randn((3, 576)).to(torch.bfloat16).to(backend.device)
    slots = torch.tensor([num_blocks * page - 1, 3_273_604, 6_547_208], device=backend.device)
    append_kv_cache(rows, cache, slots, "V32")
    inputs = make_sparse_decode_inputs(1, h_q=4, topk=3, device=backend.device)
    inputs.primary = replace(inputs.primary, cache=cache, indices=slots.int().view(1, 1, 3))
    check_decode(inputs)


# ---- Schedules.


def sparse_blocks(topk: int, extra: int) -> int:
    return max(1, -(-topk // 64)) + -(-extra // 64)


def test_the_first_call_plans_and_later_calls_reuse(backend: Target) -> None:
    lengths, extra_lengths = [300, 0, 65, 64], [10, 0, 129, 64]
    inputs = make_sparse_decode_inputs(
        4,
        2,
        h_q=16,
        topk=300,
        kv_format="MODEL1",
        lengths=lengths,
        extra_topk=150,
        extra_page=2,
        extra_lengths=extra_lengths,
        device=backend.device,
    )
    meta, _ = get_mla_metadata()
    check_decode(inputs, meta)
    assert meta.have_initialized
    assert meta.config == FlashMLASchedMeta.Config(4, 2, 16, 64, 1, False, True, 300, 2, 150)
    blocks = [sparse_blocks(*pair) for pair in zip(lengths, extra_lengths, strict=True)]
    done = [0] * 4
    for begin, end, begin_block, end_block, *_ in meta.tile_scheduler_metadata.tolist():
        for request in range(begin, end + 1 if begin < 4 else begin):
            first, last = (begin_block if request == begin else 0), (end_block if request == end else blocks[request])
            assert first == done[request]
            done[request] = last
    assert done == blocks
    assert meta.num_splits.shape == (5,)
    rows = meta.tile_scheduler_metadata
    check_decode(inputs, meta)
    assert meta.tile_scheduler_metadata is rows


def test_lengths_by_token_plan_for_the_longest(backend: Target) -> None:
    lengths = torch.tensor([[1, 200], [0, 0]], dtype=torch.int32, device=backend.device)
    inputs = make_sparse_decode_inputs(2, 2, h_q=4, topk=300, device=backend.device)
    inputs.primary.lengths = lengths
    meta, _ = get_mla_metadata()
    run_decode(inputs, meta)
    last = [row for row in meta.tile_scheduler_metadata.tolist() if row[0] < 2][-1]
    assert sum(sparse_blocks(length, 0) for length in (200, 0)) == 5
    assert last[1] == 1
    assert last[3] == 1


MISMATCHES = {
    "b": ({"b": 1}, 2, 1),
    "s_q": ({"s_q": 2}, 1, 2),
    "h_q": ({"h_q": 8}, 4, 8),
    "page_block_size": ({"page": 32}, 64, 32),
    "is_fp8_kvcache": ({"kv_format": "BF16"}, True, False),
    "topk": ({"topk": 71}, 70, 71),
    "extra_topk": ({"extra_topk": 8}, 9, 8),
    "extra_page_block_size": ({"extra_page": 4}, 2, 4),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_another_shape_is_refused(backend: Target, field: str) -> None:
    changed, planned, given = MISMATCHES[field]
    options = {"b": 2, "h_q": 4, "topk": 70, "extra_topk": 9, "device": backend.device}
    first = make_sparse_decode_inputs(**options)
    meta, _ = get_mla_metadata()
    run_decode(first, meta)
    text = rf"tile_scheduler_metadata\.config\.{field}: wanted {planned} \(as planned\), got {given};"
    with pytest.raises(ValueError, match=text):
        run_decode(make_sparse_decode_inputs(**{**options, **changed}), meta)
    check_decode(first, meta)
    meta.tile_scheduler_metadata = None  # forces a new plan
    check_decode(make_sparse_decode_inputs(**{**options, **changed}), meta)


def test_a_dense_schedule_is_refused(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, device=backend.device)
    meta, _ = get_mla_metadata()
    run_decode(inputs, meta)
    meta.config = replace(meta.config, topk=None)
    with pytest.raises(ValueError, match=r"config\.topk: wanted None \(as planned\), got 70"):
        run_decode(inputs, meta)


@pytest.mark.parametrize("parts", [1, 2, 5, 78])
def test_rows_that_an_engine_wrote(backend: Target, parts: int) -> None:
    inputs = make_sparse_decode_inputs(3, h_q=16, topk=300, extra_topk=70, device=backend.device)
    blocks = 64 * sparse_blocks(300, 70)
    total = 3 * blocks // 64
    cuts = sorted({part * total // parts for part in range(1, parts)} - {0, total})
    rows, num_splits = make_schedule([blocks] * 3, cuts, idle=2, device=backend.device)
    check_decode(inputs, rows, num_splits)
    meta = FlashMLASchedMeta(tile_scheduler_metadata=rows, num_splits=num_splits)
    check_decode(inputs, meta)
    assert meta.tile_scheduler_metadata is rows
    assert meta.config.topk == 300


@pytest.mark.parametrize("known", [KVFormat.V32, KVFormat.MODEL1])
@pytest.mark.parametrize("h_q", [8, 32, 64, 128])
def test_short_lists_one_behind_the_other(backend: Target, h_q: int, known: KVFormat) -> None:
    """Parts with many lists of no key, one block, or an odd number of blocks."""
    lengths = [0, 1, 64, 0, 0, 129, 65, 300, 1, 0, 192, 128, 1, 1, 0, 320, 63, 0, 2, 66]
    inputs = make_sparse_decode_inputs(
        len(lengths), h_q=h_q, topk=320, kv_format=known, lengths=lengths, sink=True, device=backend.device
    )
    counts = [sparse_blocks(length, 0) for length in lengths]
    schedule = make_schedule([64 * count for count in counts], [sum(counts) // 2], device=backend.device)
    wanted = run_decode(inputs, *schedule)
    check_decode(inputs, result=wanted)
    for _ in range(3):
        assert_same_bits(run_decode(inputs, *schedule), wanted)


def test_a_refused_call_leaves_the_object_unplanned(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, device=backend.device)
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match="out: wanted shape"):
        run_decode(inputs, meta, out=torch.empty((1, 1, 1, 512), dtype=torch.bfloat16, device=backend.device))
    assert meta == FlashMLASchedMeta()
    check_decode(inputs, meta, enable_batch_invariant=True)
    assert meta == FlashMLASchedMeta()


# ---- torch.compile, opcheck.


def test_compiled_without_graph_breaks(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(
        2, 2, h_q=4, kv_format="MODEL1", extra_topk=5, lengths="request", sink=True, device=backend.device
    )
    call = inputs.call()

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        meta, _ = get_mla_metadata()
        out, lse = flash_mla_with_kvcache(**{**call, "q": q}, tile_scheduler_metadata=meta)
        again, _ = flash_mla_with_kvcache(**{**call, "q": q + 0.5}, tile_scheduler_metadata=meta)
        return out + again, lse

    torch._dynamo.reset()
    with backends.use(None):
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if backend.is_cuda else "aot_eager")
        for one, other in zip(compiled(inputs.q), step(inputs.q), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_opcheck(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(2, 2, h_q=4, extra_topk=5, lengths="request", sink=True, device=backend.device)
    one, two = inputs.primary, inputs.extra
    caches = (one.cache, one.indices, one.lengths, two.cache, two.indices, two.lengths)
    plan_arguments = (inputs.q, one.lengths, two.lengths, 2, 4, 70, 5)
    for prefix in ("triton_",) if backend.name == "triton" else ("", "reference_"):
        plan = getattr(torch.ops.flash_mla, f"{prefix}plan_sparse_decode").default
        torch.library.opcheck(plan, plan_arguments)
        rows = plan(*plan_arguments)
        arguments = (inputs.q, *caches, *rows, inputs.attn_sink, "V32", "V32", 512, 0.04, False)
        torch.library.opcheck(getattr(torch.ops.flash_mla, f"{prefix}sparse_decode").default, arguments)
        out = torch.zeros((2, 2, 4, 512), dtype=torch.bfloat16, device=backend.device)
        lse = torch.zeros((2, 4, 2), device=backend.device)
        operator = getattr(torch.ops.flash_mla, f"{prefix}sparse_decode_out").default
        torch.library.opcheck(operator, (*arguments, out, lse))


def test_results_do_not_require_gradients(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, device=backend.device)
    inputs.q.requires_grad_()
    out, lse = run_decode(inputs)
    assert not out.requires_grad
    assert not lse.requires_grad


# ---- Errors.

INT = torch.int32

WRONG = {
    "q dtype": ({"q": lambda q: q.half()}, TypeError, "q: wanted torch.bfloat16, got torch.float16"),
    "q dims": ({"q": lambda q: q[0]}, ValueError, r"q: wanted 4 dimensions \[b, s_q, h_q, d_qk\]"),
    "q None": ({"q": lambda q: None}, TypeError, r"q: wanted a tensor \[b, s_q, h_q, d_qk\], got None"),
    "q heads": ({"q": lambda q: q[:, :, :0]}, ValueError, "q: wanted s_q and h_q of at least 1"),
    "q stride": ({"q": lambda q: q.repeat(1, 1, 1, 2)[..., ::2]}, ValueError, "q: wanted a contiguous last dimension"),
    "q d_qk": (
        {"q": lambda q: q[..., :512]},
        ValueError,
        r"k_cache: wanted 584 \(MODEL1\) or 528 \(V41\) or 288 \(V41_FP4\) bytes per token for d_qk = 512, got 656",
    ),
    "q other d_qk": (
        {"q": lambda q: q[..., :128]},
        ValueError,
        r"q: wanted d_qk \(last dimension\) 576 or 512, got 128",
    ),
    "cache bytes": (
        {"k_cache": lambda k: k[..., :640]},
        ValueError,
        r"k_cache: wanted 656 \(V32\) bytes per token for d_qk = 576, got 640",
    ),
    "cache dtype": (
        {"k_cache": lambda k: k.to(torch.int16)},
        TypeError,
        "k_cache: wanted torch.bfloat16 or torch.float8",
    ),
    "cache stride": (
        {"k_cache": lambda k: torch.zeros((5, 64, 1, 660), dtype=torch.uint8, device=k.device)[..., :656]},
        ValueError,
        r"k_cache: wanted stride\(1\) that is a multiple of 16 bytes, got 660",
    ),
    "format name": ({"kv_format": lambda f: "V33"}, ValueError, r"kv_format: wanted V32 or .*, got 'V33'"),
    "format of another d_qk": (
        {"kv_format": lambda f: "V41"},
        ValueError,
        "kv_format: wanted a format of d_qk = 576, like q, got V41 of 512",
    ),
    "format of another dtype": (
        {"kv_format": lambda f: "BF16"},
        TypeError,
        "k_cache: wanted torch.bfloat16, got torch.uint8",
    ),
    "flag": (
        {
            "is_fp8_kvcache": lambda f: True,
            "k_cache": lambda k: torch.zeros((5, 64, 1, 576), dtype=torch.bfloat16, device=k.device),
        },
        ValueError,
        "is_fp8_kvcache: wanted False, since k_cache is torch.bfloat16, got True",
    ),
    "causal": ({"causal": lambda c: True}, ValueError, r"causal: wanted False with indices .*, got True"),
    "descale": (
        {"descale_k": lambda d: torch.ones(1)},
        ValueError,
        "descale_k: wanted None with indices .*, got Tensor",
    ),
    "indices dtype": ({"indices": lambda i: i.long()}, TypeError, "indices: wanted torch.int32, got torch.int64"),
    "indices dims": ({"indices": lambda i: i[0]}, ValueError, r"indices: wanted 3 dimensions \[b, s_q, topk\]"),
    "indices b": (
        {"indices": lambda i: i[:1]},
        ValueError,
        r"indices: wanted shape \[b, s_q, topk\] with \[2, 1\] .*, got",
    ),
    "indices none": ({"indices": lambda i: i[..., :0]}, ValueError, r"indices: wanted shape .* at least 1 behind, got"),
    "indices stride": ({"indices": lambda i: i[..., ::2]}, ValueError, "indices: wanted a contiguous last dimension"),
    "length dtype": (
        {"topk_length": lambda n: torch.zeros(2, dtype=torch.int64)},
        TypeError,
        "topk_length: wanted torch.int32, got torch.int64",
    ),
    "length shape": (
        {"topk_length": lambda n: torch.zeros(3, dtype=torch.int32)},
        ValueError,
        r"topk_length: wanted shape \[b\] = \[2\] or \[b, s_q\] = \[2, 1\], got \[3\]",
    ),
    "length type": (
        {"topk_length": lambda n: 5},
        TypeError,
        r"topk_length: wanted a tensor \[b\] or \[b, s_q\], got int",
    ),
    "extra cache alone": (
        {"extra_indices_in_kvcache": lambda i: None, "extra_topk_length": lambda n: None},
        ValueError,
        r"extra_indices_in_kvcache: wanted int32 \[b, s_q, extra_topk\] with extra_k_cache, got None",
    ),
    "extra indices alone": (
        {"extra_k_cache": lambda k: None},
        ValueError,
        "extra_indices_in_kvcache: wanted None without extra_k_cache, got Tensor",
    ),
    "extra length alone": (
        {
            "extra_k_cache": lambda k: None,
            "extra_indices_in_kvcache": lambda i: None,
            "extra_topk_length": lambda n: torch.zeros(2, dtype=torch.int32),
        },
        ValueError,
        "extra_topk_length: wanted None without extra_k_cache, got Tensor",
    ),
    "extra indices dtype": (
        {"extra_indices_in_kvcache": lambda i: i.long()},
        TypeError,
        "extra_indices_in_kvcache: wanted torch.int32, got torch.int64",
    ),
    "extra format": (
        {"extra_k_cache": lambda k: k.view(torch.uint8)[..., :528]},
        ValueError,
        r"extra_k_cache: wanted 656 bytes per token \(V32\), got 528",
    ),
    "sink dtype": (
        {"attn_sink": lambda s: torch.zeros(4, dtype=torch.bfloat16)},
        TypeError,
        "attn_sink: wanted torch.float32, got torch.bfloat16",
    ),
    "sink shape": (
        {"attn_sink": lambda s: torch.zeros(5)},
        ValueError,
        r"attn_sink: wanted shape \[h_q\] = \[4\], got",
    ),
    "head_dim_v": ({"head_dim_v": lambda d: 576}, ValueError, "head_dim_v: wanted 512, got 576"),
    "scale": ({"softmax_scale": lambda s: math.nan}, ValueError, "softmax_scale: wanted a finite number, got nan"),
    "invariant": (
        {"enable_batch_invariant": lambda b: "yes"},
        TypeError,
        "enable_batch_invariant: wanted a bool, got str",
    ),
    "metadata": (
        {"tile_scheduler_metadata": lambda m: None},
        TypeError,
        r"tile_scheduler_metadata: wanted a tensor \[num_sm_parts, 8\] or a FlashMLASchedMeta, got None",
    ),
    "num_splits": (
        {"tile_scheduler_metadata": lambda m: torch.zeros((1, 8), dtype=torch.int32)},
        TypeError,
        r"num_splits: wanted a tensor \[b \+ 1\], got None",
    ),
    "out dtype": (
        {"out": lambda o: torch.zeros((2, 1, 4, 512))},
        TypeError,
        "out: wanted torch.bfloat16, got torch.float32",
    ),
    "lse shape": (
        {"lse": lambda o: torch.zeros((2, 1, 4))},
        ValueError,
        r"lse: wanted shape \[b, h_q, s_q\] = \[2, 4, 1\], got \[2, 1, 4\]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(backend: Target, case: str) -> None:
    changes, error, text = WRONG[case]
    inputs = make_sparse_decode_inputs(2, h_q=4, extra_topk=5, device=backend.device)
    call = {**inputs.call(), "kv_format": None, "tile_scheduler_metadata": FlashMLASchedMeta()}
    spoiled = {name: change(call.get(name)) for name, change in changes.items()}
    moved = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in spoiled.items()}
    with pytest.raises(error, match=text):
        flash_mla_with_kvcache(**{**call, **moved})
    flash_mla_with_kvcache(**call)


def test_fp4_is_for_the_extra_cache(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4, kv_format="V41_FP4", device=backend.device)
    with pytest.raises(
        ValueError, match=r"k_cache: wanted another format \(V41_FP4 is for the extra cache, beside V41\)"
    ):
        run_decode(inputs)
    beside = make_sparse_decode_inputs(2, h_q=4, kv_format="MODEL1", extra_topk=5, device=backend.device)
    beside.extra = inputs.primary
    with pytest.raises(ValueError, match=r"extra_k_cache: wanted 584 bytes per token \(MODEL1\), got 288"):
        run_decode(beside)


def test_ignored_arguments(backend: Target) -> None:
    """block_table and cache_seqlens: None, dummies and empty tensors are all passed in practice."""
    inputs = make_sparse_decode_inputs(2, h_q=4, device=backend.device)
    wanted = run_decode(inputs)
    empty = torch.empty((2, 0), dtype=INT, device=backend.device)
    for table, lengths in ((empty, empty[:, 0:0]), (torch.full((2, 3), -7), torch.tensor([9, 9])), (None, empty)):
        call = {**inputs.call(), "block_table": table, "cache_seqlens": lengths}
        assert_same_bits(flash_mla_with_kvcache(**call, tile_scheduler_metadata=FlashMLASchedMeta()), wanted)


def test_the_cuda_backend_says_why_not() -> None:
    inputs = make_sparse_decode_inputs(2, h_q=4)
    with (
        backends.use("cuda"),
        pytest.raises(UnsupportedError, match="sparse decode: no backend takes the problem; cuda:"),
    ):
        run_decode(inputs)
    reason = flash_mla.why_not("sparse_decode", **inputs.call())
    assert reason is not None
    assert reason.startswith("cuda: the tensors are on cpu; triton: ")
    with pytest.raises(TypeError, match="why_not: wanted a SparseDecodeProblem, or the tensors q= and k_cache= and"):
        flash_mla.why_not("sparse_decode", q=inputs.q)


def test_an_empty_batch(backend: Target) -> None:
    inputs = make_sparse_decode_inputs(1, h_q=4, device=backend.device)
    inputs.q = inputs.q[:0]
    inputs.primary.indices = inputs.primary.indices[:0]
    out, lse = run_decode(inputs)
    assert out.shape == (0, 1, 4, 512)
    assert lse.shape == (0, 4, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_format", PRIMARY_FORMATS)
@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_many_requests_give_the_same_bits_again_and_again(cuda: Target, kv_format: KVFormat, h_q: int) -> None:
    """All multiprocessors at work, several lists each: an error of hand-overs within a kernel shows as other bits."""
    options: dict[str, int] = {"num_blocks": 64} if kv_format is not KVFormat.BF16 else {}
    requests, times = (40, 3) if cuda.emulated else (150, 30)
    inputs = make_sparse_decode_inputs(
        requests, h_q=h_q, topk=700, kv_format=kv_format, lengths="token", spread=3.0, device=cuda.device, **options
    )
    check_decode(inputs)
    wanted = run_decode(inputs)
    for _ in range(times):
        assert_same_bits(run_decode(inputs), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", ["none", "request", "token"])
@pytest.mark.parametrize(
    ("b", "s_q", "topk", "extra_topk"),
    [
        (1, 1, 2048, 0),
        (1, 3, 64, 1),
        (2, 2, 128, 512),
        (2, 2, 70, 1024),
        (3, 1, 1000, 0),
        (8, 2, 128, 512),
        (45, 1, 600, 0),
        (130, 2, 190, 60),
    ],
)
@pytest.mark.parametrize("h_q", [12, 20, 40, 64, 100, 128])
@pytest.mark.parametrize("kv_format", [KVFormat.V32, KVFormat.MODEL1, KVFormat.V41])
def test_lists_cut_without_a_plan(
    cuda: Target,
    kv_format: KVFormat,
    h_q: int,
    b: int,
    s_q: int,
    topk: int,
    extra_topk: int,
    lengths: Literal["none", "request", "token"],
) -> None:
    """Lists in pieces, or whole in several waves, without a plan where that serves them better."""
    inputs = make_sparse_decode_inputs(
        b,
        s_q,
        h_q=h_q,
        topk=topk,
        extra_topk=extra_topk,
        kv_format=kv_format,
        lengths=lengths,
        extra_lengths=lengths,
        sink=True,
        spread=2.0,
        device=cuda.device,
    )
    wanted = run_decode(inputs)
    check_decode(inputs, result=wanted)
    for _ in range(1 if cuda.emulated else 5):
        assert_same_bits(run_decode(inputs), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("h_q", [64, 128])
def test_captured_calls_of_few_requests_follow_the_lengths(cuda: Target, h_q: int) -> None:
    """One behind the other, so that each starts while the one before still runs."""
    inputs = make_sparse_decode_inputs(
        2,
        2,
        h_q=h_q,
        topk=128,
        extra_topk=512,
        kv_format="MODEL1",
        lengths="request",
        extra_lengths="request",
        device=cuda.device,
    )
    schedule = FlashMLASchedMeta()
    run_decode(inputs, schedule)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [run_decode(inputs, schedule) for _ in range(4)]
    assert inputs.extra is not None
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        for side, most in ((inputs.primary, 128), (inputs.extra, 512)):
            assert side.lengths is not None
            side.lengths.copy_(torch.randint(0, most + 1, side.lengths.shape, generator=generator))
        for out, lse in results:
            out.fill_(math.nan)
            lse.fill_(math.nan)
        graph.replay()
        check_decode(inputs, result=results[0])
        for result in results[1:]:
            assert_same_bits(result, results[0])
