"""Dense decode on every backend, against float64: shapes, traps, bits and memory."""

import math

import pytest
import torch
from conftest import Target
from torch import Tensor

import flash_mla
from flash_mla import (
    DenseDecodeProblem,
    FlashMLASchedMeta,
    UnsupportedError,
    backends,
    get_mla_decoding_metadata,
    get_mla_metadata,
)
from flash_mla.backends import reference
from flash_mla.testing import check_dense_decode, make_dense_decode_inputs, make_schedule, run_dense_decode

HEADS = (1, 3, 8, 9, 12, 16, 20, 63, 64, 96, 126, 128)
PAGES = (1, 3, 16, 32, 53, 64, 96, 128, 256, 1000)
DTYPES = (torch.bfloat16, torch.float16)


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, in order."""
    return tensor.flatten().contiguous().view(torch.uint8)


def assert_same_bits(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    for name, a, b in zip(("out", "lse"), one, other, strict=True):
        assert a.shape == b.shape
        differ = bits(a) != bits(b)
        assert not differ.any(), f"{name}: {int(differ.sum())} of {differ.numel()} bytes differ"


# ---- Shapes.


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("h_q", HEADS)
def test_heads(backend: Target, h_q: int, d_qk: int, dtype: torch.dtype) -> None:
    lengths = backend.lengths(65, 0, 1, 200)
    check_dense_decode(
        make_dense_decode_inputs(lengths, h_q=h_q, d_qk=d_qk, dtype=dtype, device=backend.device, sink=h_q % 2 == 0)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("h_q", "h_kv"), [(2, 2), (8, 2), (64, 2), (128, 2), (3, 3), (9, 3), (126, 3), (8, 8), (16, 8), (128, 8)]
)
def test_grouped_heads(backend: Target, h_q: int, h_kv: int, causal: bool) -> None:
    lengths = backend.lengths(70, 0, 129)
    check_dense_decode(
        make_dense_decode_inputs(lengths, s_q=2, h_q=h_q, h_kv=h_kv, device=backend.device, causal=causal, sink=True)
    )


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("h_q", [1, 16, 24, 128])
@pytest.mark.parametrize("s_q", [1, 2, 3, 4, 7, 16, 65])
def test_queries(backend: Target, s_q: int, h_q: int, causal: bool) -> None:
    if not backend.on_gpu:
        h_q = min(h_q, max(1, 1024 // s_q))
    lengths = backend.lengths(66, 1, 0, s_q, s_q - 1, 150)
    check_dense_decode(make_dense_decode_inputs(lengths, s_q=s_q, h_q=h_q, device=backend.device, causal=causal))


@pytest.mark.parametrize("causal", [False, True])
def test_a_thousand_queries(backend: Target, causal: bool) -> None:
    lengths = [1100, 1024, 700, 0, 1]
    h_q = 16 if backend.on_gpu else 1
    check_dense_decode(make_dense_decode_inputs(lengths, s_q=1024, h_q=h_q, device=backend.device, causal=causal))


@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("page", PAGES)
def test_pages(backend: Target, page: int, d_qk: int) -> None:
    lengths = backend.lengths(page, page + 1, 0, max(page - 1, 1), 3 * page + 2, 190)
    inputs = make_dense_decode_inputs(
        lengths, s_q=2, h_q=8, d_qk=d_qk, page=page, device=backend.device, causal=True, spare_pages=3
    )
    check_dense_decode(inputs)


@pytest.mark.parametrize("page", [3, 16, 64])
@pytest.mark.parametrize("h_kv", [2, 3])
def test_pages_with_grouped_heads(backend: Target, page: int, h_kv: int) -> None:
    inputs = make_dense_decode_inputs(
        backend.lengths(65, 0, 130), s_q=3, h_q=6 * h_kv, h_kv=h_kv, page=page, device=backend.device, causal=True
    )
    check_dense_decode(inputs)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193])
def test_lengths_around_a_block(backend: Target, length: int) -> None:
    check_dense_decode(make_dense_decode_inputs([length] * 3, s_q=2, h_q=64, device=backend.device, causal=True))


def test_one_request_that_fills_the_machine(backend: Target) -> None:
    length = 40_000 if backend.on_gpu else 3000
    for h_q in (16, 128) if backend.on_gpu else (16,):
        check_dense_decode(make_dense_decode_inputs([length], h_q=h_q, device=backend.device))


def test_many_requests(backend: Target) -> None:
    count, longest = (500, 900) if backend.on_gpu else (60, 100)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(0, longest, (count,), generator=generator).tolist()
    check_dense_decode(make_dense_decode_inputs(lengths, s_q=2, h_q=8, device=backend.device, causal=True))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 0.5])
def test_scale(backend: Target, scale: float) -> None:
    inputs = make_dense_decode_inputs(backend.lengths(65, 0, 130), h_q=16, device=backend.device, sink=True)
    inputs.softmax_scale = scale
    check_dense_decode(inputs)


@pytest.mark.parametrize("magnitude", [-80, -20, 20, 80])
@pytest.mark.parametrize("h_q", [16, 64, 128])
def test_values_of_any_magnitude_in_pieces(backend: Target, h_q: int, magnitude: int) -> None:
    """Of requests in pieces, which are joined, no number leaves its range in between."""
    lengths = [3000, 2000] if backend.on_gpu else [200, 70]
    inputs = make_dense_decode_inputs(lengths, h_q=h_q if backend.on_gpu else 4, device=backend.device)
    inputs.k_cache.mul_(2.0**magnitude)
    inputs.softmax_scale = 2.0**-magnitude / 24
    check_dense_decode(inputs)


def test_a_negative_scale(backend: Target) -> None:
    """No CUDA kernel takes it. Alone they say so; else Triton serves, or the reference with a warning."""
    inputs = make_dense_decode_inputs(backend.lengths(65, 0, 130), h_q=16, device=backend.device)
    inputs.softmax_scale = -0.05
    if backend.is_cuda:
        reason = flash_mla.why_not("dense_decode", **inputs.call())
        assert reason is not None
        assert "softmax_scale must not be negative" in reason
        with pytest.raises(UnsupportedError, match="softmax_scale must not be negative"):
            run_dense_decode(inputs)
        with backends.use(None):
            if backends.TRITON.why_not(DenseDecodeProblem.of(inputs.q, inputs.k_cache)) is None:
                check_dense_decode(inputs)
                return
            reference.forget_warnings()
            with pytest.warns(RuntimeWarning, match="the reference backend serves CUDA tensors"):
                check_dense_decode(inputs)
    else:
        check_dense_decode(inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
def test_peaked_scores(backend: Target, dtype: torch.dtype) -> None:
    inputs = make_dense_decode_inputs(
        backend.lengths(65, 1, 0, 190), s_q=2, h_q=16, dtype=dtype, device=backend.device, spread=8.0, causal=True
    )
    check_dense_decode(inputs)


def test_the_largest_score_comes_last(backend: Target) -> None:
    """Every block raises the running maximum, so every rescaling is taken."""
    inputs = make_dense_decode_inputs(backend.lengths(500), h_q=16, page=64, device=backend.device)
    for request, length in enumerate(inputs.cache_seqlens.tolist()):
        for page in range(-(-length // 64)):
            inputs.k_cache[inputs.block_table[request, page]] *= 1 + page
    check_dense_decode(inputs)


# ---- Queries without keys, sinks, and memory that may not be read.


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("num_pages", [1, 2])
def test_no_keys_at_all(backend: Target, num_pages: int, sink: bool) -> None:
    inputs = make_dense_decode_inputs(
        [0, 0, 0, 0], s_q=2, h_q=20, device=backend.device, sink=sink, spare_pages=num_pages
    )
    out, lse = run_dense_decode(inputs)
    assert out.shape == (4, 2, 20, 512)
    assert not out.any()
    assert bool((lse == math.inf).all())
    out, lse = run_dense_decode(inputs, enable_batch_invariant=True)
    assert not out.any()
    assert bool((lse == math.inf).all())


def test_an_empty_block_table(backend: Target) -> None:
    inputs = make_dense_decode_inputs([0, 0], device=backend.device)
    inputs.block_table = inputs.block_table[:, :0].contiguous()
    out, lse = run_dense_decode(inputs)
    assert not out.any()
    assert bool((lse == math.inf).all())


def test_causal_queries_before_the_first_key(backend: Target) -> None:
    inputs = make_dense_decode_inputs([3, 1, 8], s_q=8, h_q=12, device=backend.device, causal=True, sink=True)
    result = run_dense_decode(inputs)
    check_dense_decode(inputs, result=result)
    out, lse = result
    assert not out[0, :5].any()
    assert bool((lse[0, :, :5] == math.inf).all())
    assert bool(lse[0, :, 5:].isfinite().all())


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -1e30, 1e30, 3e38, 0.0])
def test_extreme_sinks(backend: Target, sink: float) -> None:
    inputs = make_dense_decode_inputs(backend.lengths(65, 0, 130), s_q=2, h_q=16, device=backend.device, causal=True)
    without = run_dense_decode(inputs)
    inputs.attn_sink = torch.full((16,), sink, device=backend.device)
    out, lse = run_dense_decode(inputs)
    check_dense_decode(inputs, result=(out, lse))
    assert torch.equal(lse, without[1])
    if sink < 0:
        assert torch.equal(out, without[0])
    if sink > 1:
        assert not out.any()


def test_nothing_unreachable_matters(backend: Target) -> None:
    """The same bits whatever the unreached slots and block-table entries hold."""
    lengths = backend.lengths(65, 0, 130, 1)
    trapped = make_dense_decode_inputs(lengths, s_q=2, h_q=16, page=64, device=backend.device, causal=True)
    clean = make_dense_decode_inputs(lengths, s_q=2, h_q=16, page=64, device=backend.device, causal=True)
    clean.k_cache.nan_to_num_(nan=0.0)
    for request, length in enumerate(lengths):
        clean.block_table[request, -(-length // 64) :] = 0
    assert_same_bits(run_dense_decode(trapped), run_dense_decode(clean))
    trapped.k_cache.masked_fill_(trapped.k_cache.isnan(), math.inf)
    assert_same_bits(run_dense_decode(trapped), run_dense_decode(clean))


def test_unread_bytes_of_other_tensors(backend: Target) -> None:
    """NaN around a strided q and around an interleaved pool stay where they are, and change no bit."""
    options = {"s_q": 2, "h_q": 20, "device": backend.device, "causal": True}
    lengths = backend.lengths(65, 0, 130)
    plain = make_dense_decode_inputs(lengths, **options)
    strided = make_dense_decode_inputs(lengths, q_layout="strided", cache_layout="interleaved", **options)
    assert not strided.q.is_contiguous()
    assert not strided.k_cache.is_contiguous()
    assert_same_bits(run_dense_decode(strided), run_dense_decode(plain))
    check_dense_decode(strided)


@pytest.mark.parametrize(("page", "h_kv"), [(16, 2), (64, 2), (3, 1)])
def test_other_cache_strides(backend: Target, page: int, h_kv: int) -> None:
    """Rows padded, and heads outside of slots."""
    inputs = make_dense_decode_inputs(backend.lengths(65, 0, 130), h_q=12, h_kv=h_kv, page=page, device=backend.device)
    plain = run_dense_decode(inputs)
    num_blocks, _, _, d_qk = inputs.k_cache.shape
    room = torch.full((num_blocks, h_kv, page + 1, d_qk + 64), math.nan, dtype=torch.bfloat16, device=backend.device)
    view = room[:, :, :page, :d_qk].transpose(1, 2)
    view.copy_(inputs.k_cache)
    inputs.k_cache = view
    assert_same_bits(run_dense_decode(inputs), plain)


# ---- Outputs.


def guarded(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """A NaN-filled tensor of `shape` inside a buffer whose other bytes are 0xA5, and the buffer as bytes."""
    size = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
    margin = 4096
    buffer = torch.full((size + 2 * margin,), 0xA5, dtype=torch.uint8, device=device)
    tensor = buffer[margin : margin + size].view(dtype).view(shape)
    tensor.fill_(math.nan)
    return tensor, buffer


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("h_q", [9, 128])
def test_given_outputs(backend: Target, h_q: int, batch_invariant: bool) -> None:
    lengths = backend.lengths(65, 0, 130)
    inputs = make_dense_decode_inputs(lengths, s_q=3, h_q=h_q, device=backend.device, causal=True)
    b, margin = len(lengths), 4096
    out, out_bytes = guarded((b, 3, h_q, 512), torch.bfloat16, backend.device)
    lse, lse_bytes = guarded((b, h_q, 3), torch.float32, backend.device)
    options = {"enable_batch_invariant": batch_invariant}
    result = run_dense_decode(inputs, out=out, lse=lse, **options)
    assert result[0] is out
    assert result[1] is lse
    for buffer in (out_bytes, lse_bytes):
        assert bool((buffer[:margin] == 0xA5).all())
        assert bool((buffer[-margin:] == 0xA5).all())
    assert_same_bits(result, run_dense_decode(inputs, **options))
    check_dense_decode(inputs, result=result)


def test_one_given_output(backend: Target) -> None:
    inputs = make_dense_decode_inputs([70, 3], h_q=16, device=backend.device)
    plain = run_dense_decode(inputs)
    out, lse = torch.full_like(plain[0], math.nan), torch.full_like(plain[1], math.nan)
    only_out, only_lse = run_dense_decode(inputs, out=out), run_dense_decode(inputs, lse=lse)
    assert only_out[0] is out
    assert only_lse[1] is lse
    assert_same_bits(only_out, plain)
    assert_same_bits(only_lse, plain)


def test_strided_outputs(backend: Target) -> None:
    lengths = backend.lengths(65, 0, 130)
    inputs = make_dense_decode_inputs(lengths, s_q=3, h_q=20, device=backend.device, causal=True)
    b = len(lengths)
    room = torch.full((b, 4, 22, 640), 7.0, dtype=torch.bfloat16, device=backend.device)
    lse_room = torch.full((b, 4, 22), 7.0, device=backend.device)
    out, lse = room[:, :3, 1:21, 64:576], lse_room[:, :3, 1:21].transpose(1, 2)
    result = run_dense_decode(inputs, out=out, lse=lse)
    assert_same_bits(result, run_dense_decode(inputs))
    room[:, :3, 1:21, 64:576] = 7.0
    lse_room[:, :3, 1:21] = 7.0
    assert bool((room == 7.0).all())
    assert bool((lse_room == 7.0).all())


def test_results_do_not_require_gradients(backend: Target) -> None:
    inputs = make_dense_decode_inputs([70], h_q=16, device=backend.device)
    inputs.q.requires_grad_()
    out, lse = run_dense_decode(inputs)
    assert not out.requires_grad
    assert not lse.requires_grad


# ---- Bits.


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("h_q", [16, 128])
def test_repeat_runs_give_the_same_bits(backend: Target, h_q: int, batch_invariant: bool) -> None:
    inputs = make_dense_decode_inputs(backend.lengths(65, 0, 190), s_q=2, h_q=h_q, device=backend.device, causal=True)
    first = run_dense_decode(inputs, enable_batch_invariant=batch_invariant)
    for _ in range(10 if backend.on_gpu else 2):
        assert_same_bits(run_dense_decode(inputs, enable_batch_invariant=batch_invariant), first)


@pytest.mark.gpu
@pytest.mark.parametrize("page", [16, 48, 64])
@pytest.mark.parametrize(("h_q", "s_q"), [(16, 1), (128, 1), (128, 2)])
def test_many_requests_give_the_same_bits_again_and_again(cuda: Target, h_q: int, s_q: int, page: int) -> None:
    """All multiprocessors at work, several requests each: an error of hand-overs within a kernel shows as other bits.

    Tiles of several pages, of rows that are copied, and of one page.
    """
    requests, times = (20, 3) if cuda.emulated else (150, 30)
    lengths = torch.randint(0, 700, (requests,), generator=torch.Generator().manual_seed(page)).tolist()
    inputs = make_dense_decode_inputs(lengths, s_q=s_q, h_q=h_q, page=page, device=cuda.device, causal=True)
    wanted = run_dense_decode(inputs)
    check_dense_decode(inputs, result=wanted)
    for _ in range(times):
        assert_same_bits(run_dense_decode(inputs), wanted)


@pytest.mark.parametrize("h_q", [16, 128])
@pytest.mark.parametrize("s_q", [1, 3])
def test_batch_invariance(backend: Target, s_q: int, h_q: int) -> None:
    """A request alone, among others, beside padding and with a wider block table: the same bits."""
    lengths = backend.lengths(65, 1, 0, 190, 700)
    inputs = make_dense_decode_inputs(lengths, s_q=s_q, h_q=h_q, device=backend.device, causal=True, sink=True)
    whole = run_dense_decode(inputs, enable_batch_invariant=True)
    check_dense_decode(inputs, result=whole)
    for request in range(len(lengths)):
        alone = run_dense_decode(inputs.rows(slice(request, request + 1)), enable_batch_invariant=True)
        assert_same_bits(alone, (whole[0][request : request + 1], whole[1][request : request + 1]))
    padding = 5
    padded = inputs.rows(slice(0, len(lengths)))
    padded.q = torch.cat([padded.q, torch.full_like(padded.q[:1], math.nan).repeat(padding, 1, 1, 1)])
    padded.cache_seqlens = torch.nn.functional.pad(padded.cache_seqlens, (0, padding))
    padded.block_table = torch.nn.functional.pad(padded.block_table, (0, 9, 0, padding), value=-7)
    out, lse = run_dense_decode(padded, enable_batch_invariant=True)
    assert_same_bits((out[:-padding], lse[:-padding]), whole)
    assert not out[-padding:].any()


@pytest.mark.gpu
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_graph_replay_gives_the_bits_of_eager(gpu: Target, batch_invariant: bool) -> None:
    inputs = make_dense_decode_inputs(gpu.lengths(65, 0, 190), s_q=2, h_q=16, device="cuda", causal=True)
    eager = run_dense_decode(inputs, enable_batch_invariant=batch_invariant)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_dense_decode(inputs, enable_batch_invariant=batch_invariant)
    for _ in range(3):
        captured[0].fill_(math.nan)
        captured[1].fill_(math.nan)
        graph.replay()
        assert_same_bits(captured, eager)


# ---- Schedules that others wrote, and schedules for other lengths.

SCHEDULE_LENGTHS = (300, 64, 0, 65, 1, 1000, 0, 128, 500, 7)


def even_cuts(total: int, parts: int) -> list[int]:
    return sorted({part * total // parts for part in range(1, parts)} - {0, total})


@pytest.mark.parametrize("idle", [0, 1, 9])
@pytest.mark.parametrize("parts", [1, 2, 3, 17, 66, 132, 300, 100_000])
def test_rows_that_an_engine_wrote(backend: Target, parts: int, idle: int) -> None:
    lengths = backend.lengths(*SCHEDULE_LENGTHS)
    inputs = make_dense_decode_inputs(lengths, s_q=2, h_q=16, device=backend.device, causal=True, sink=True)
    total = sum(max(1, -(-length // 64)) for length in lengths)
    rows, num_splits = make_schedule(lengths, even_cuts(total, parts), idle, backend.device)
    check_dense_decode(inputs, rows, num_splits)


@pytest.mark.parametrize("h_q", [8, 64])
def test_random_rows_of_an_engine(backend: Target, h_q: int) -> None:
    lengths = backend.lengths(*SCHEDULE_LENGTHS)
    inputs = make_dense_decode_inputs(lengths, h_q=h_q, device=backend.device)
    total = sum(max(1, -(-length // 64)) for length in lengths)
    for seed in range(6 if backend.on_gpu else 2):
        generator = torch.Generator().manual_seed(seed)
        cuts = (torch.randperm(total - 1, generator=generator)[: 7 * seed + 1] + 1).sort().values.tolist()
        rows, num_splits = make_schedule(lengths, cuts, seed, backend.device)
        check_dense_decode(inputs, rows, num_splits)


@pytest.mark.parametrize("h_q", [16, 40])
@pytest.mark.parametrize("planned_for", ["longer", "shorter", "zero", "shifted", "one long"])
def test_a_stale_plan_gives_right_answers(backend: Target, planned_for: str, h_q: int) -> None:
    lengths = backend.lengths(*SCHEDULE_LENGTHS)
    inputs = make_dense_decode_inputs(lengths, s_q=2, h_q=h_q, device=backend.device, causal=True)
    other = {
        "longer": [3 * length + 100 for length in lengths],
        "shorter": [length // 5 for length in lengths],
        "zero": [0 for _ in lengths],
        "shifted": [*lengths[3:], *lengths[:3]],
        "one long": [20_000, *(0 for _ in lengths[1:])],
    }[planned_for]
    stale = torch.tensor(other, dtype=torch.int32, device=backend.device)
    rows, num_splits = get_mla_decoding_metadata(stale, 2 * h_q, 1, h_q)
    check_dense_decode(inputs, rows, num_splits)
    meta = FlashMLASchedMeta(tile_scheduler_metadata=rows, num_splits=num_splits)
    check_dense_decode(inputs, meta)


@pytest.mark.gpu
@pytest.mark.parametrize("plan_inside", [True, False])
def test_a_graph_is_right_for_other_lengths(gpu: Target, plan_inside: bool) -> None:
    inputs = make_dense_decode_inputs([900, 1000, 3000, 800, 5000], s_q=2, h_q=16, device="cuda", causal=True)
    inputs.k_cache.nan_to_num_(nan=0.5)  # lengths shrink below: what was reached stays readable
    meta, _ = get_mla_metadata()
    if not plan_inside:
        run_dense_decode(inputs, meta)
    run_dense_decode(inputs)  # warm up
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run_dense_decode(inputs, meta)
    for lengths in ([900, 1000, 3000, 800, 5000], [1, 0, 2999, 64, 65], [0] * 5, [0, 0, 0, 0, 5000], [900, 1, 1, 1, 1]):
        inputs.cache_seqlens.copy_(torch.tensor(lengths, dtype=torch.int32))
        captured[0].fill_(math.nan)
        captured[1].fill_(math.nan)
        graph.replay()
        check_dense_decode(inputs, result=captured)


# ---- Size.


@pytest.mark.gpu
@pytest.mark.parametrize("b", [11_673, 11_674, 200_000])
def test_huge_batches(gpu: Target, b: int) -> None:
    b = min(b, 20_000) if gpu.emulated else b
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = make_dense_decode_inputs([64 * 100], h_q=1, device="cuda")
    pages = inputs.block_table[0, :100]
    inputs.q = torch.randn((b, 1, 1, 576), generator=generator, device="cuda", dtype=torch.bfloat16)
    inputs.block_table = pages[torch.randint(0, 100, (b, 2), generator=generator, device="cuda")]
    inputs.cache_seqlens = torch.randint(0, 90, (b,), generator=generator, device="cuda", dtype=torch.int32)
    result = run_dense_decode(inputs)
    step = 50_000
    for start in range(0, b, step):
        part = slice(start, start + step)
        check_dense_decode(inputs.rows(part), result=(result[0][part], result[1][part]), compute_dtype=torch.float32)


@pytest.mark.gpu
def test_a_cache_beyond_4_gib(gpu: Target) -> None:
    if torch.cuda.mem_get_info()[0] < 20 << 30:
        pytest.skip("needs 20 GiB of free device memory")
    num_blocks, page = 66_000, 64
    inputs = make_dense_decode_inputs([0, 0, 0], h_q=16, device="cuda", spare_pages=0)
    inputs.k_cache = torch.full((num_blocks, page, 1, 576), math.nan, dtype=torch.bfloat16, device="cuda")
    assert inputs.k_cache.numel() > 2**31
    assert inputs.k_cache.numel() * 2 > 2**32
    used = torch.tensor([[0, num_blocks - 1], [num_blocks - 2, 40_000], [33_000, 58_255]], device="cuda")
    inputs.k_cache[used.flatten()] = torch.randn((6, page, 1, 576), device="cuda").bfloat16()
    inputs.block_table = used.int()
    inputs.cache_seqlens = torch.tensor([128, 100, 65], dtype=torch.int32, device="cuda")
    check_dense_decode(inputs)


def scratch_bytes(call: object) -> int:
    """Peak device memory that a call asks for beside what it returns, which must be preallocated.

    What the allocator rounds up does not count.
    """

    def requested(which: str) -> int:
        return torch.cuda.memory_stats()[f"requested_bytes.all.{which}"]

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = requested("current")
    call()
    torch.cuda.synchronize()
    return requested("peak") - before


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("b", "s_q", "h_q"), [(1, 1, 128), (64, 1, 16), (3, 1024, 128), (3000, 2, 128), (2, 65, 24), (2, 25, 128)]
)
def test_memory_is_bounded(gpu: Target, b: int, s_q: int, h_q: int) -> None:
    lengths = [700] * b if b < 1000 else [70] * b
    if gpu.emulated:  # still more row tiles than SMs
        b, s_q, lengths = min(b, 300), min(s_q, 65), lengths[:300]
    inputs = make_dense_decode_inputs(lengths, s_q=s_q, h_q=h_q, device="cuda", causal=True)
    out = torch.empty((b, s_q, h_q, 512), dtype=torch.bfloat16, device="cuda")
    lse = torch.empty((b, h_q, s_q), device="cuda")
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    slack = 4096
    limit = 2 * sms * 64 * (512 + 1) * 4 + slack
    rows, num_splits = get_mla_decoding_metadata(inputs.cache_seqlens, s_q * h_q, 1, h_q)
    assert scratch_bytes(lambda: run_dense_decode(inputs, rows, num_splits, out=out, lse=lse)) <= limit
    assert scratch_bytes(lambda: run_dense_decode(inputs, enable_batch_invariant=True, out=out, lse=lse)) <= limit
    rows, num_splits = make_schedule(lengths, [], 0, "cuda")
    assert scratch_bytes(lambda: run_dense_decode(inputs, rows, num_splits, out=out, lse=lse)) <= slack


def test_a_capability_query_agrees_with_the_call(backend: Target) -> None:
    inputs = make_dense_decode_inputs([70], h_q=16, device=backend.device)
    reason = flash_mla.why_not("dense_decode", **inputs.call())
    if backend.name == "reference":
        assert reason is not None
        assert "cuda: the tensors are on cpu" in reason
        assert "triton: " in reason
    else:
        assert reason is None
