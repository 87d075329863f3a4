"""The Triton backend: who is chosen and why not, tiles, and dense decode with tiles other than the chosen one."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from conftest import Target, target
from test_dense_decode import assert_same_bits
from test_errors import PROBLEM, run_python
from test_schedule import check_schedule, random_lengths
from torch._subclasses.fake_tensor import FakeTensorMode

from flash_mla import (
    DensePrefillBackwardProblem,
    DensePrefillProblem,
    FlashMLASchedMeta,
    KVCacheProblem,
    KVFormat,
    SparseDecodeProblem,
    SparsePrefillBackwardProblem,
    SparsePrefillProblem,
    UnsupportedError,
    backends,
    flash_attn_varlen_func,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    merge_attention_states,
)
from flash_mla.backends import capability, reference, triton
from flash_mla.backends.triton import config
from flash_mla.backends.triton.config import Gpu, Tile
from flash_mla.problem import Problem
from flash_mla.testing import (
    check_dense_decode,
    check_dense_prefill,
    check_sparse_prefill,
    make_dense_decode_inputs,
    make_dense_prefill_inputs,
    make_schedule,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
)

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(triton.missing() is not None, reason=f"triton: {triton.missing()}")


@pytest.fixture
def triton_target() -> Iterator[Target]:
    chosen = target("triton")
    with backends.use("triton"):
        yield chosen


# ---- The choice.


def test_importing_the_package_imports_no_triton() -> None:
    result = run_python("import flash_mla, sys; print('triton' in sys.modules)")
    assert result.stdout.strip() == "False", result.stderr


def test_the_order_of_the_registry() -> None:
    assert [backend.name for backend in backends.REGISTRY] == ["cuda", "triton", "reference"]


@needs_triton
def test_it_serves_what_cuda_kernels_decline() -> None:
    ampere = replace(PROBLEM, compute_capability=80)
    assert backends.select(ampere) is backends.TRITON
    assert backends.select(replace(PROBLEM, softmax_scale=-1.0)) is backends.TRITON
    assert backends.select(ampere, behind=backends.TRITON) is backends.REFERENCE


@needs_triton
@pytest.mark.skipif(config.interpreting(), reason="TRITON_INTERPRET=1 lifts what depends on the device")
def test_reasons_of_the_device() -> None:
    assert triton.why_not(replace(PROBLEM, compute_capability=75)) == (
        "needs compute capability 8.0 or newer, the GPU has 7.5"
    )
    reason = triton.why_not(replace(PROBLEM, device_type="cpu", compute_capability=None))
    assert reason is not None
    assert reason.startswith("the tensors are on cpu (TRITON_INTERPRET=1")
    inputs = make_dense_decode_inputs([70])
    with backends.use("triton"):
        with pytest.raises(UnsupportedError, match="no backend takes the problem; triton: the tensors are on cpu"):
            flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=None, enable_batch_invariant=True)
        with pytest.raises(UnsupportedError, match="merging: no backend takes the problem; triton: the tensors are on"):
            merge_attention_states([torch.zeros(1, 1, 512)], [torch.zeros(1, 1)])


@needs_triton
def test_reasons_of_the_problem() -> None:
    for change, text in (
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16, got float32"),
        ({"d_qk": 128}, "d_qk must be 576 or 512, got 128"),
        ({"d_v": 256}, "d_v must be 512, got 256"),
    ):
        assert triton.why_not(replace(PROBLEM, **change)) == text
    mha = DensePrefillProblem("cuda", 90, torch.float16, 4, 8, 2, 128, 128, True, False, True, 0.04)
    assert triton.why_not(mha) is None
    assert triton.why_not(replace(mha, dtype=torch.float32)) == "dtype must be bfloat16 or float16, got float32"
    assert triton.why_not(replace(mha, d_qk=64)) == "d_qk must be 192 or 128, got 64"
    assert triton.why_not(replace(mha, d_v=64)) == "d_v must be 128, got 64"
    assert triton.why_not(DensePrefillBackwardProblem(**vars(mha))) == triton.support.NO_GRADIENTS
    prefill = SparsePrefillProblem("cuda", 90, KVFormat.V32, None, 4, 2, 576, 576, 9, 0, 0.04)
    assert triton.why_not(prefill) is None
    assert triton.why_not(SparsePrefillBackwardProblem(**vars(prefill))) == triton.support.NO_GRADIENTS
    assert triton.why_not(replace(prefill, d_v=577)) == "d_v must be 1 to 576, got 577"
    assert triton.why_not(replace(prefill, d_qk=128)) == "d_qk must be 576 or 512, got 128"


def test_every_operation_is_served_without_being_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU without CUDA kernels; but gradients are the reference's."""
    monkeypatch.setattr(triton.support, "missing", lambda: None)
    sparse, prefill = make_sparse_decode_inputs(2, h_q=2), make_sparse_prefill_inputs(2, h_q=2)
    dense = make_dense_prefill_inputs([(3, 5)])
    prefill_arguments = dense.q, dense.k, dense.v, dense.cu_seqlens_qo
    prefill_tensors = prefill.q, prefill.primary.cache, prefill.primary.indices
    gradients: list[Problem] = [
        SparsePrefillBackwardProblem.of(*prefill_tensors),
        DensePrefillBackwardProblem.of(*prefill_arguments),
    ]
    problems: list[Problem] = [
        PROBLEM,
        replace(PROBLEM, fp8_cache="V32"),
        SparseDecodeProblem.of(sparse.q, sparse.primary.cache, sparse.primary.indices),
        SparsePrefillProblem.of(*prefill_tensors),
        DensePrefillProblem.of(*prefill_arguments),
        KVCacheProblem("cuda", 80, KVFormat.V41_FP4, 64),
    ]
    assert {problem.op for problem in [*problems, *gradients]} == set(capability.OPERATIONS)
    for problem in problems:
        assert backends.select(replace(problem, device_type="cuda", compute_capability=80)) is backends.TRITON
    for problem in gradients:
        assert backends.select(replace(problem, device_type="cuda", compute_capability=80)) is backends.REFERENCE
    operators = {field.name for field in fields(backends.Operators)}
    assert set(triton.OPERATORS) == operators


def test_what_cuda_declines_goes_to_triton_else_to_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where CUDA's table has nothing against the problem: the operator sees more of the call."""
    declined, ampere = UnsupportedError("no kernel takes it"), replace(PROBLEM, compute_capability=80)
    monkeypatch.setattr(triton.support, "missing", lambda: None)
    reference.forget_warnings()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.after(declined, ampere) is backends.TRITON
        assert backends.after(declined, PROBLEM) is backends.TRITON
        assert backends.after(declined, replace(ampere, fp8_cache="V32")) is backends.TRITON
        assert backends.after(declined, KVCacheProblem("cuda", 80, KVFormat.V32, 64)) is backends.TRITON
    monkeypatch.setattr(triton.support, "missing", lambda: "triton is not installed")
    reference.forget_warnings()
    with pytest.warns(RuntimeWarning, match="the reference backend serves CUDA tensors"):
        assert backends.after(declined, ampere) is backends.REFERENCE
    for name in ("cuda", "triton"):
        with backends.use(name), pytest.raises(UnsupportedError, match=f"no backend takes the problem; {name}: "):
            backends.after(declined, replace(PROBLEM, fp8_cache="V32", device_type="cpu", compute_capability=None))


@pytest.mark.parametrize("name", ["plan_dense_decode", "plan_sparse_decode", "merge_attention_states"])
def test_a_declined_plan_or_merge_goes_to_the_reference(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    texts = ["flash_mla[UnsupportedError] none takes it", "flash_mla[CudaError] it broke"]

    def refuse(*_: object) -> None:
        raise RuntimeError(texts[0])

    def call() -> object:
        if name != "merge_attention_states":
            topk = 64 if name == "plan_sparse_decode" else None
            return get_mla_decoding_metadata(torch.tensor([100], dtype=torch.int32), 16, 1, topk=topk)
        return merge_attention_states([torch.zeros(1, 1, 512)], [torch.zeros(1, 1)])

    monkeypatch.setattr(backends, "active", replace(backends.AUTOMATIC, **{name: refuse}))
    reference.forget_warnings()
    with pytest.warns(RuntimeWarning, match="the reference backend serves CUDA tensors .*: none takes it"):
        call()
    texts.pop(0)
    with pytest.raises(RuntimeError, match=r"^it broke$"):
        call()


def test_without_the_library_cuda_tensors_go_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_registered", lambda name: lambda *_: name)
    operators = backends.Operators.made_by(backends._triton_first)
    with FakeTensorMode():
        on_gpu, on_cpu = torch.empty(1, device="cuda"), torch.empty(1)
    for name in triton.OPERATORS:
        for first in ((lambda t: t), (lambda t: [t])):
            assert getattr(operators, name)(first(on_gpu)) == f"triton_{name}"
            assert getattr(operators, name)(first(on_cpu)) == name


def test_without_triton_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    triton.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    try:
        assert triton.why_not(PROBLEM) == "triton is not installed (pip install 'flash_mla[triton]')"
    finally:
        triton.missing.cache_clear()


@pytest.mark.parametrize("version", ["3.3.1", "3.10.0", "2.1"])
def test_another_version_is_declined(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    triton.missing.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)
    try:
        assert triton.missing() == f"triton must be at least 3.4 and below 3.10, version {version} is installed"
    finally:
        triton.missing.cache_clear()


def test_the_pin_is_the_range_that_is_checked() -> None:
    oldest, too_new = (".".join(map(str, pair)) for pair in (triton.support.OLDEST, triton.support.TOO_NEW))
    assert f'"triton>={oldest},<{too_new}"' in (ROOT / "pyproject.toml").read_text()


def test_the_environment_asks_for_it() -> None:
    code = "from flash_mla import backends; print(backends.override.name)"
    assert run_python(code, FLASH_MLA_BACKEND="triton").stdout.strip() == "triton"


# ---- Tiles.

CARDS = [Gpu(80, 166912, 108), Gpu(86, 101376, 82), Gpu(90, 232448, 132), Gpu(100, 232448, 148), Gpu(120, 101376, 170)]


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: f"sm{gpu.capability}")
@pytest.mark.parametrize("d_qk", [576, 512])
def test_tiles_fit_and_suit_the_rows(gpu: Gpu, d_qk: int) -> None:
    for rows in (1, 16, 17, 32, 33, 64, 128, 5000):
        tile = config.dense_tile(gpu, rows, d_qk)
        assert config.shared_bytes(tile, d_qk, tile.block_m == 64) <= gpu.shared_memory
        assert tile.block_m >= min(rows, 32)
        assert tile.block_m < 2 * max(rows, 16)
        assert 64 % tile.block_n == 0  # cuts of a schedule lie between tiles
        long = config.dense_tile(gpu, rows, d_qk, long=True)
        assert long.block_m == tile.block_m
        assert long == tile or (rows <= 32 and gpu.capability == 90)
        assert config.shared_bytes(long, d_qk, long.block_m == 64) <= gpu.shared_memory
        for in_flight in (0, 288, 656):
            (height,) = {tile.block_m for tile in config.sparse_tiles(gpu, rows, d_qk, in_flight)}
            assert height in ((16, 64) if in_flight else (tile.block_m,))
        assert {tile.block_m for tile in config.dense_tiles(gpu, rows, d_qk, long=True)} == {tile.block_m}


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: f"sm{gpu.capability}")
@pytest.mark.parametrize(("s_q", "h_q", "h_kv"), [(1, 16, 1), (1, 128, 1), (2, 128, 1), (65, 128, 8), (1024, 128, 1)])
def test_partial_results_are_bounded(gpu: Gpu, s_q: int, h_q: int, h_kv: int) -> None:
    rows = s_q * (h_q // h_kv)
    height = config.dense_tile(gpu, rows, 576).block_m
    tiles = h_kv * -(-rows // height)
    parts, few = config.num_parts(gpu, s_q, h_q, h_kv)
    assert 1 <= few <= parts
    assert parts == 1 or 2 * parts * tiles * height <= 2 * gpu.num_sms * 64


@pytest.mark.parametrize("tile", [(16, 16, 4, 2), (16, 32, 4, 4), (32, 64, 8, 2), (64, 64, 8, 2)])
@pytest.mark.parametrize("page", [64, 24])
def test_every_tile_gives_the_answer(triton_target: Target, tile: tuple[int, ...], page: int) -> None:
    from flash_mla.backends.triton import dense_decode as kernels

    lengths = [130, 0, 65]
    inputs = make_dense_decode_inputs(
        lengths, s_q=2, h_q=10, page=page, causal=True, sink=True, device=triton_target.device
    )
    out = torch.full((3, 2, 10, 512), float("nan"), dtype=torch.bfloat16, device=triton_target.device)
    lse = torch.full((3, 10, 2), float("nan"), device=triton_target.device)
    call = kernels.Call(*list(inputs.call().values())[:4], inputs.attn_sink, 576**-0.5, True, out, lse)
    kernels.dense_decode(call, *make_schedule(lengths, [1, 4], 1, triton_target.device), Tile(*tile))
    check_dense_decode(inputs, result=(out, lse))


@needs_triton
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    ("b", "s_q", "h_q"), [(1, 1, 128), (64, 1, 16), (3, 1024, 128), (3000, 2, 128), (2, 65, 24), (2, 25, 128)]
)
def test_bytes_of_partial_results(
    monkeypatch: pytest.MonkeyPatch, b: int, s_q: int, h_q: int, sparse: bool, batch_invariant: bool
) -> None:
    """What a GPU of 132 multiprocessors would allocate: 64 rows, 512 values and a logarithm each, for twice as many."""
    from flash_mla.backends.triton import dense_decode, sparse_decode
    from flash_mla.backends.triton.dequant import Format

    h200 = Gpu(90, 232448, 132)
    kernels = sparse_decode if sparse else dense_decode
    taken = [0]
    make_partials = kernels._partials

    def partials(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        made = make_partials(*arguments)
        taken.append(sum(tensor.nbytes for tensor in made))
        return made

    monkeypatch.setattr(Gpu, "of", staticmethod(lambda device: h200))
    for name, replacement in {
        "_launch": lambda *_, **__: None,
        "_join": lambda *_, **__: None,
        "_compacted": lambda keys: keys,
        "_partials": partials,
    }.items():
        monkeypatch.setattr(kernels, name, replacement, raising=name != "_compacted")
    q, cache = torch.empty((b, s_q, h_q, 576), device="meta"), torch.empty((b, 64, 1, 576), device="meta")
    results = None, 0.04, torch.empty((b, s_q, h_q, 512), device="meta"), torch.empty((b, h_q, s_q), device="meta")
    if sparse:
        indices, length = (torch.empty(shape, device="meta").int() for shape in ((b, s_q, 2048), (b, s_q)))
        keys = sparse_decode.Keys(cache, Format.BF16_576, indices, length)
        call = sparse_decode.Call(q, keys, None, *results)
        parts = config.num_sparse_parts(h200, s_q, h_q)
    else:
        table = torch.empty((b, 40), device="meta")
        call = dense_decode.Call(q, cache, table, table[:, 0], *results[:2], True, *results[2:])
        parts, _ = config.num_parts(h200, s_q, h_q, 1)
    schedule = torch.empty((parts, 8), device="meta")
    if batch_invariant:
        getattr(kernels, f"{kernels.__name__.rpartition('.')[2]}_batch_invariant")(call)
    else:
        getattr(kernels, kernels.__name__.rpartition(".")[2])(call, schedule, schedule)
    assert max(taken) <= 2 * 132 * 64 * (512 + 1) * 4


# ---- Planning.


@pytest.mark.parametrize("num_parts", [1, 7, 132, 999])
def test_a_plan_of_any_size(triton_target: Target, num_parts: int) -> None:
    """More parts than the interpreter has by itself; lengths long enough for cuts to move to the edges of requests."""
    from flash_mla.backends.triton.plan import plan_dense_decode

    for seed in (0, 3, 7, 13):
        lengths = random_lengths(seed)
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=triton_target.device)
        check_schedule(*plan_dense_decode(seqlens, num_parts), lengths)


def test_few_keys_are_cut_into_few_parts(triton_target: Target) -> None:
    from flash_mla.backends.triton.plan import LEAST_PART, plan_dense_decode

    for blocks, used in ((LEAST_PART * 20 - 1, 10), (LEAST_PART * 20, 20)):
        lengths = [64 * (blocks - 7), 64 * 7]
        seqlens = torch.tensor(lengths, dtype=torch.int32, device=triton_target.device)
        rows, num_splits = plan_dense_decode(seqlens, 20, 10)
        check_schedule(rows, num_splits, lengths)
        assert int((rows[:, 0] < 2).sum()) == used


def test_cuts_move_to_the_edges_of_requests(triton_target: Target) -> None:
    from flash_mla.backends.triton.plan import plan_dense_decode

    lengths = [64 * 101, 64 * 99, 64 * 100, 64 * 100]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=triton_target.device)
    rows, num_splits = plan_dense_decode(seqlens, 4)
    check_schedule(rows, num_splits, lengths)
    assert num_splits.tolist() == [0, 1, 2, 3, 4]


# ---- Dense decode through the public function: the traps in small. The contract's tests run over this backend too.


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize(
    ("d_qk", "dtype", "h_q", "h_kv", "s_q", "page"),
    [
        (576, torch.bfloat16, 16, 1, 1, 64),
        (512, torch.float16, 9, 3, 3, 16),
        (576, torch.float16, 3, 1, 2, 1),
        (512, torch.bfloat16, 40, 1, 1, 256),
    ],
)
def test_dense_decode(
    triton_target: Target,
    d_qk: int,
    dtype: torch.dtype,
    h_q: int,
    h_kv: int,
    s_q: int,
    page: int,
    batch_invariant: bool,
) -> None:
    inputs = make_dense_decode_inputs(
        [520, 0, 65],
        s_q=s_q,
        h_q=h_q,
        h_kv=h_kv,
        d_qk=d_qk,
        page=page,
        dtype=dtype,
        causal=True,
        sink=h_q % 2 == 1,
        device=triton_target.device,
    )
    options = {"tile_scheduler_metadata": FlashMLASchedMeta(), "enable_batch_invariant": batch_invariant}
    first = flash_mla_with_kvcache(**inputs.call(), **options)
    check_dense_decode(inputs, result=first)
    assert_same_bits(flash_mla_with_kvcache(**inputs.call(), **options), first)


# ---- Sparse prefill: what CUDA kernels do not take. The contract's tests run over this backend too.


@pytest.mark.parametrize("d_v", [513, 576])
@pytest.mark.parametrize(("h_q", "known"), [(5, "V32"), (40, "V32"), (5, "BF16")])
def test_values_behind_the_first_512(triton_target: Target, h_q: int, known: str, d_v: int) -> None:
    inputs = make_sparse_prefill_inputs(
        3,
        d_v=d_v,
        h_q=h_q,
        topk=70,
        kv_format=known,
        lengths="token",
        invalid=0.3,
        extra_topk=20,
        sink=True,
        device=triton_target.device,
    )
    check_sparse_prefill(inputs)


@pytest.mark.parametrize("known", ["V32", "MODEL1", "V41"])
def test_caches_whose_rows_are_selected_often_are_converted_once(
    triton_target: Target, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flash_mla.backends.triton import sparse_prefill

    inputs = make_sparse_prefill_inputs(
        3, h_q=5, topk=70, kv_format=known, invalid=0.3, extra_topk=20, sink=True, device=triton_target.device
    )
    converted = []
    dequantize = sparse_prefill.dequantize_kv_cache
    monkeypatch.setattr(
        sparse_prefill, "dequantize_kv_cache", lambda cache, kind: converted.append(kind) or dequantize(cache, kind)
    )
    check_sparse_prefill(inputs)
    assert converted == []
    monkeypatch.setattr(sparse_prefill, "MIN_USES", 0)
    check_sparse_prefill(inputs)
    assert converted == [KVFormat[known]] * 2
    monkeypatch.setattr(sparse_prefill, "MAX_COPY", 1000)
    check_sparse_prefill(inputs)
    assert len(converted) == 2


# ---- Dense prefill: tiles, and running lengths that a kernel must survive. The contract's tests run here too.


@pytest.mark.parametrize("gpu", CARDS, ids=lambda gpu: f"sm{gpu.capability}")
@pytest.mark.parametrize("d_qk", [192, 128])
def test_a_tile_of_dense_prefill_fits(gpu: Gpu, d_qk: int) -> None:
    tile = config.prefill_tiles(gpu, d_qk)[0]
    assert tile.block_m == 128
    assert 2 * (d_qk * tile.block_m + tile.block_n * (d_qk + 128)) <= gpu.shared_memory


@pytest.mark.parametrize("tile", [(16, 16), (32, 64), (64, 128), (128, 128)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_tile_of_dense_prefill_gives_the_answer(
    triton_target: Target, causal: bool, tile: tuple[int, int]
) -> None:
    from flash_mla.backends.triton.dense_prefill import dense_prefill

    lengths = [(40, 64), (0, 7), (16, 0), (31, 130), (130, 33), (1, 1), (64, 64)]
    inputs = make_dense_prefill_inputs(lengths, h_q=2, h_kv=1, causal=causal, device=triton_target.device)
    tensors = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)
    check_dense_prefill(inputs, result=dense_prefill(*tensors, 192**-0.5, causal, Tile(*tile, 4, 2)))


@pytest.mark.parametrize("values", [[5, -7, 10**9, 3, 200], [0, 300, 0, 300, 0], [-(2**31), 2**31 - 1, 9, 0, -1]])
@pytest.mark.parametrize("which", ["q", "kv", "both"])
def test_nonsense_running_lengths(triton_target: Target, which: str, values: list[int]) -> None:
    """What comes out means nothing, but it is written, and made of the tensors' own values."""
    inputs = make_dense_prefill_inputs(
        [(60, 90), (70, 10), (80, 50), (90, 150)], h_q=1, h_kv=1, spare=0, causal=True, device=triton_target.device
    )
    nonsense = torch.tensor(values, dtype=torch.int32, device=triton_target.device)
    if which != "kv":
        inputs.cu_seqlens_qo = nonsense
    if which != "q":
        inputs.cu_seqlens_kv = nonsense
    out, lse = flash_attn_varlen_func(**inputs.call())
    assert bool(out.isfinite().all())
    assert bool((lse.isfinite() | (lse == float("inf"))).all())
    assert float(out.abs().max()) <= float(inputs.v.abs().max()) * 1.01


# ---- Compilers.


@needs_triton
@pytest.mark.parametrize(
    "kernel", ["dense_decode", "sparse_decode", "sparse_prefill", "dense_prefill", "append", "deq"]
)
def test_kernels_compile_for_cards_that_are_not_here(kernel: str) -> None:
    """Ahead of time, within each card's limits; all of them: tools/check_triton.py without --quick."""
    command = [sys.executable, str(ROOT / "tools" / "check_triton.py"), "--quick", "--only", kernel]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    for card in ("sm80", "sm89", "sm120"):
        assert f"{card} {kernel}" in result.stdout
