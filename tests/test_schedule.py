"""The split-KV schedule: every block is computed once, and the metadata object behaves as engines expect."""

from dataclasses import replace

import pytest
import torch
from conftest import Target
from torch import Tensor

from flash_mla import FlashMLASchedMeta, backends, get_mla_decoding_metadata, get_mla_metadata
from flash_mla.backends.reference_schedule import plan_in_torch
from flash_mla.schedule import pieces
from flash_mla.testing import check_dense_decode, make_dense_decode_inputs, make_schedule, run_dense_decode


def blocks(lengths: list[int]) -> list[int]:
    return [max(1, -(-length // 64)) for length in lengths]


def check_schedule(rows: Tensor, num_splits: Tensor, lengths: list[int]) -> None:
    """Every block of every request exactly once, in order; splits counted and flagged as the rows say."""
    b = len(lengths)
    assert rows.dtype == num_splits.dtype == torch.int32
    assert rows.shape[1] == 8
    assert num_splits.shape == (b + 1,)
    assert not rows[:, 7].any()
    done = [0] * b
    splits = [0] * b
    seen = pieces(rows, num_splits, torch.tensor(lengths, dtype=torch.int32))
    flags: list[list[bool]] = [[] for _ in range(b)]
    for previous, piece in zip([None, *seen], seen, strict=False):
        if previous is not None:
            assert (piece.request, piece.begin_block) > (previous.request, previous.begin_block)
            assert piece.part >= previous.part
        assert piece.begin_block == done[piece.request], piece
        assert piece.end_block > piece.begin_block, piece
        assert piece.split == splits[piece.request], piece
        done[piece.request] = piece.end_block
        splits[piece.request] += 1
        flags[piece.request].append(piece.is_split)
    assert done == blocks(lengths)
    assert torch.equal(num_splits.cpu(), torch.tensor([0, *splits]).cumsum(0).int())
    for request in range(b):
        assert flags[request] == [splits[request] > 1] * splits[request], request
    parts_at_work = len({piece.part for piece in seen})
    idle = rows[parts_at_work:].cpu()
    assert bool((idle[:, 0] == b).all())


def random_lengths(seed: int) -> list[int]:
    """Batches of many kinds: empty ones, uniform, skewed, exact multiples of a block."""
    generator = torch.Generator().manual_seed(seed)
    b = int(torch.randint(1, 60, (), generator=generator))
    longest = (2, 65, 700, 9000)[seed % 4]
    lengths = torch.randint(0, longest, (b,), generator=generator)
    if seed % 3 == 1:
        lengths[torch.randint(0, b, (), generator=generator)] = 100_000
    if seed % 5 == 2:
        lengths = lengths // 64 * 64
    if seed % 7 == 3:
        lengths[torch.rand(b, generator=generator) < 0.7] = 0
    return lengths.tolist()


@pytest.mark.parametrize("num_parts", [1, 2, 7, 8, 132, 999])
def test_the_pytorch_planner_covers_every_block_once(num_parts: int) -> None:
    for seed in range(40):
        lengths = random_lengths(seed)
        rows, num_splits = plan_in_torch(torch.tensor(lengths, dtype=torch.int32), num_parts)
        assert rows.shape == (num_parts, 8)
        check_schedule(rows, num_splits, lengths)


@pytest.mark.parametrize(
    ("s_q", "h_q", "h_kv"), [(1, 128, 1), (2, 128, 1), (1, 16, 1), (1, 16, 8), (3, 9, 3), (65, 128, 2)]
)
def test_the_planner_covers_every_block_once(backend: Target, s_q: int, h_q: int, h_kv: int) -> None:
    for seed in range(40):
        lengths = random_lengths(seed)
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=backend.device)
        check_schedule(*get_mla_decoding_metadata(seqlens, s_q * h_q // h_kv, h_kv, h_q), lengths)


@pytest.mark.parametrize("lengths", [[0], [1], [64], [65], [0] * 9, [1_000_000], [0, 1_000_000, 0]])
def test_edge_batches(backend: Target, lengths: list[int]) -> None:
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=backend.device)
    check_schedule(*get_mla_decoding_metadata(seqlens, 16, 1), lengths)


@pytest.mark.parametrize("b", [1, 1024, 1025, 11_673, 11_674, 200_000])
def test_no_limit_on_the_batch(backend: Target, b: int) -> None:
    generator = torch.Generator().manual_seed(b)
    lengths = torch.randint(0, 300, (b,), generator=generator, dtype=torch.int32)
    rows, num_splits = get_mla_decoding_metadata(lengths.to(backend.device), 16, 1)
    check_schedule(rows, num_splits, lengths.tolist())


def test_an_empty_batch_plans_to_nothing(backend: Target) -> None:
    rows, num_splits = get_mla_decoding_metadata(torch.empty(0, dtype=torch.int32, device=backend.device), 16, 1)
    assert bool((rows == 0).all())
    assert num_splits.tolist() == [0]


def test_planning_is_repeatable(backend: Target) -> None:
    seqlens = torch.tensor(random_lengths(7), dtype=torch.int32, device=backend.device)
    first = get_mla_decoding_metadata(seqlens, 128, 1)
    for _ in range(5):
        again = get_mla_decoding_metadata(seqlens, 128, 1)
        assert torch.equal(again[0], first[0])
        assert torch.equal(again[1], first[1])


@pytest.mark.gpu
def test_planning_does_not_synchronise(gpu: Target) -> None:
    seqlens = torch.tensor(random_lengths(7), dtype=torch.int32, device="cuda")
    get_mla_decoding_metadata(seqlens, 128, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        get_mla_decoding_metadata(seqlens, 128, 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_captured_plan_follows_the_lengths(gpu: Target) -> None:
    seqlens = torch.tensor(random_lengths(4), dtype=torch.int32, device="cuda")
    b = seqlens.shape[0]
    get_mla_decoding_metadata(seqlens, 128, 1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows, num_splits = get_mla_decoding_metadata(seqlens, 128, 1)
    for seed in range(5):
        lengths = torch.randint(0, 5000, (b,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
        seqlens.copy_(lengths)
        graph.replay()
        check_schedule(rows, num_splits, lengths.tolist())


@pytest.mark.gpu
def test_both_planners_take_the_same_arguments(cuda: Target) -> None:
    seqlens = torch.tensor(random_lengths(5), dtype=torch.int32, device="cuda")
    fast = torch.ops.flash_mla.plan_dense_decode(seqlens, 2, 16, 1)
    slow = torch.ops.flash_mla.reference_plan_dense_decode(seqlens, 2, 16, 1)
    assert fast[0].dtype == slow[0].dtype
    assert fast[1].shape == slow[1].shape


def test_rows_written_by_hand_cover_every_block_once() -> None:
    for seed in range(20):
        lengths = random_lengths(seed)
        total = sum(blocks(lengths))
        generator = torch.Generator().manual_seed(seed)
        cuts = (torch.randperm(total - 1, generator=generator)[:seed] + 1).sort().values.tolist() if total > 1 else []
        check_schedule(*make_schedule(lengths, cuts, idle=seed % 3), lengths)


def test_heads_need_not_be_named() -> None:
    seqlens = torch.tensor([100, 0, 3000], dtype=torch.int32)
    check_schedule(*get_mla_decoding_metadata(seqlens, 128, 1), [100, 0, 3000])
    check_schedule(*get_mla_decoding_metadata(seqlens, 8, 2, 8), [100, 0, 3000])
    check_schedule(*get_mla_decoding_metadata(seqlens, 8, 2, is_fp8_kvcache=True), [100, 0, 3000])


@pytest.mark.parametrize("h_q", [0, 3, -1])
def test_heads_that_do_not_divide(h_q: int) -> None:
    seqlens = torch.tensor([100], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"h_q: wanted a positive divisor of .* = 16, got"):
        get_mla_decoding_metadata(seqlens, 8, 2, h_q)


def test_wrong_lengths_are_named() -> None:
    with pytest.raises(TypeError, match=r"cache_seqlens: wanted torch.int32, got torch.int64"):
        get_mla_decoding_metadata(torch.tensor([100]), 8, 1)
    with pytest.raises(ValueError, match=r"cache_seqlens: wanted 1 dimensions \[b\], got shape \[1, 1\]"):
        get_mla_decoding_metadata(torch.tensor([[100]], dtype=torch.int32), 8, 1)
    with pytest.raises(ValueError, match="h_q: wanted at least 1, got 0"):
        get_mla_decoding_metadata(torch.tensor([100], dtype=torch.int32), 0, 1)


def test_a_sparse_plan_has_topk_keys_for_every_request(backend: Target) -> None:
    backend.require("sparse_decode")
    seqlens = torch.tensor([100, 0, 9000], dtype=torch.int32, device=backend.device)
    for topk in (1, 64, 2048):
        check_schedule(*get_mla_decoding_metadata(seqlens, 128, 1, 128, True, topk), [topk] * 3)
    with pytest.raises(ValueError, match="topk: wanted at least 1, got 0"):
        get_mla_decoding_metadata(seqlens, 128, 1, topk=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "blocks_each", "h_q", "longest"), [(2, 10, 64, 1), (4, 18, 128, 2), (2, 200, 128, 7)])
def test_few_short_requests_are_cut_as_finely_as_there_are_parts(
    cuda: Target, b: int, blocks_each: int, h_q: int, longest: int
) -> None:
    """For 132 multiprocessors, each with 64 rows."""
    if torch.cuda.get_device_properties(cuda.device).multi_processor_count != 132:
        pytest.skip("the numbers are those of 132 multiprocessors")
    seqlens = torch.zeros(b, dtype=torch.int32, device=cuda.device)
    rows, num_splits = get_mla_decoding_metadata(seqlens, h_q, 1, topk=64 * blocks_each)
    lengths = [64 * blocks_each] * b
    check_schedule(rows, num_splits, lengths)
    seen = pieces(rows, num_splits, torch.tensor(lengths, dtype=torch.int32))
    assert max(piece.end_block - piece.begin_block for piece in seen) == longest


@pytest.mark.gpu
@pytest.mark.parametrize(("b", "h_q", "longest"), [(64, 16, 12_000), (128, 16, 6_000), (32, 64, 12_000)])
def test_parts_of_few_rows_are_even(cuda: Target, b: int, h_q: int, longest: int) -> None:
    """But for what a cut costs: a piece takes as long as three blocks more than it has."""
    piece_blocks = 3
    lengths = torch.randint(longest // 3, longest, (b,), generator=torch.Generator().manual_seed(b)).tolist()
    rows, num_splits = get_mla_decoding_metadata(torch.tensor(lengths, dtype=torch.int32, device=cuda.device), h_q, 1)
    check_schedule(rows, num_splits, lengths)
    cost = [0] * len(rows)
    for piece in pieces(rows, num_splits, torch.tensor(lengths, dtype=torch.int32)):
        cost[piece.part] += piece.end_block - piece.begin_block + piece_blocks
    assert max(cost) <= sum(count + piece_blocks for count in blocks(lengths)) // len(rows) + piece_blocks + 2


# ---- The metadata object.


def test_any_arguments_give_a_fresh_object() -> None:
    for arguments, options in (((), {}), ((1, "a", None), {}), ((), {"topk": 5, "anything": object()})):
        meta, none = get_mla_metadata(*arguments, **options)
        assert isinstance(meta, FlashMLASchedMeta)
        assert none is None
        assert meta == FlashMLASchedMeta()
        assert not meta.have_initialized
        assert meta.config is None
        assert meta.tile_scheduler_metadata is None
        assert meta.num_splits is None


def test_the_first_call_plans_and_later_calls_reuse(backend: Target) -> None:
    inputs = make_dense_decode_inputs([100, 700, 0], s_q=2, h_q=16, h_kv=2, page=32, device=backend.device, causal=True)
    meta, _ = get_mla_metadata()
    check_dense_decode(inputs, meta)
    assert meta.have_initialized
    assert meta.config == FlashMLASchedMeta.Config(
        b=3, s_q=2, h_q=16, page_block_size=32, h_k=2, causal=True, is_fp8_kvcache=False
    )
    assert (meta.config.topk, meta.config.extra_page_block_size, meta.config.extra_topk) == (None, None, None)
    check_schedule(meta.tile_scheduler_metadata, meta.num_splits, [100, 700, 0])
    rows, num_splits = meta.tile_scheduler_metadata, meta.num_splits
    check_dense_decode(inputs, meta)
    assert meta.tile_scheduler_metadata is rows
    assert meta.num_splits is num_splits


@pytest.mark.parametrize("cleared", ["both", "tile_scheduler_metadata", "num_splits"])
def test_missing_tensors_are_planned_again(backend: Target, cleared: str) -> None:
    meta, _ = get_mla_metadata()
    run_dense_decode(make_dense_decode_inputs([100, 700], device=backend.device), meta)
    for field in ("tile_scheduler_metadata", "num_splits"):
        if cleared in ("both", field):
            setattr(meta, field, None)
    assert meta.have_initialized
    lengths = [5, 0, 3000]
    check_dense_decode(make_dense_decode_inputs(lengths, device=backend.device), meta)
    assert meta.config.b == 3
    check_schedule(meta.tile_scheduler_metadata, meta.num_splits, lengths)


def test_tensors_of_the_caller_are_kept(backend: Target) -> None:
    lengths = [100, 700]
    rows, num_splits = make_schedule(lengths, [1, 5], idle=2, device=backend.device)
    meta = FlashMLASchedMeta(tile_scheduler_metadata=rows, num_splits=num_splits)
    check_dense_decode(make_dense_decode_inputs(lengths, device=backend.device), meta)
    assert meta.tile_scheduler_metadata is rows
    assert meta.have_initialized
    assert meta.config.b == 2


def test_fields_are_writable(backend: Target) -> None:
    meta, _ = get_mla_metadata()
    run_dense_decode(make_dense_decode_inputs([100, 700], device=backend.device), meta)
    meta.config = replace(meta.config, b=3)
    meta.tile_scheduler_metadata, meta.num_splits = make_schedule([1, 2, 3], [], device=backend.device)
    check_dense_decode(make_dense_decode_inputs([1, 2, 3], device=backend.device), meta)
    meta.have_initialized = False
    meta.tile_scheduler_metadata = None
    check_dense_decode(make_dense_decode_inputs([9], device=backend.device), meta)
    assert meta.config.b == 1


MISMATCHES = {
    "b": ({"lengths": [100]}, 2, 1),
    "s_q": ({"s_q": 2}, 1, 2),
    "h_q": ({"h_q": 32}, 16, 32),
    "page_block_size": ({"page": 32}, 64, 32),
    "h_k": ({"h_kv": 2}, 1, 2),
    "causal": ({"causal": True}, False, True),
}


@pytest.mark.parametrize("field", MISMATCHES)
def test_another_shape_is_refused(backend: Target, field: str) -> None:
    changed, planned, given = MISMATCHES[field]
    meta, _ = get_mla_metadata()
    options = {"lengths": [100, 700], "h_q": 16, "device": backend.device}
    first = make_dense_decode_inputs(**options)
    run_dense_decode(first, meta)
    rows = meta.tile_scheduler_metadata
    text = rf"tile_scheduler_metadata\.config\.{field}: wanted {planned} \(as planned\), got {given};"
    with pytest.raises(ValueError, match=text):
        run_dense_decode(make_dense_decode_inputs(**{**options, **changed}), meta)
    assert meta.tile_scheduler_metadata is rows
    check_dense_decode(first, meta)


@pytest.mark.parametrize(("field", "value"), [("is_fp8_kvcache", True), ("topk", 2048)])
def test_a_schedule_of_another_kind_is_refused(backend: Target, field: str, value: object) -> None:
    inputs = make_dense_decode_inputs([100, 700], device=backend.device)
    meta, _ = get_mla_metadata()
    run_dense_decode(inputs, meta)
    setattr(meta.config, field, value)
    with pytest.raises(ValueError, match=rf"config\.{field}: wanted {value} \(as planned\), got"):
        run_dense_decode(inputs, meta)


def test_a_refused_call_leaves_the_object_unplanned(backend: Target) -> None:
    inputs = make_dense_decode_inputs([100, 700], device=backend.device)
    meta, _ = get_mla_metadata()
    with pytest.raises(ValueError, match="out: wanted shape"):
        run_dense_decode(inputs, meta, out=torch.empty((1, 1, 1, 512), dtype=torch.bfloat16, device=backend.device))
    assert meta == FlashMLASchedMeta()


def test_metadata_is_not_read_in_batch_invariant_mode(backend: Target) -> None:
    inputs = make_dense_decode_inputs([100, 700], device=backend.device)
    meta, _ = get_mla_metadata()
    check_dense_decode(inputs, meta, enable_batch_invariant=True)
    assert meta == FlashMLASchedMeta()


def test_a_plan_of_one_backend_serves_the_other(backend: Target) -> None:
    inputs = make_dense_decode_inputs([100, 700, 0], device=backend.device)
    with backends.use("reference"):
        rows, num_splits = get_mla_decoding_metadata(inputs.cache_seqlens, 16, 1)
    check_dense_decode(inputs, rows, num_splits)
