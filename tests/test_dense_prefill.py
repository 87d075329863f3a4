"""flash_attn_varlen_func and its packed forms on every backend: outputs, gradients, errors."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import Target
from test_dense_decode import bits
from torch import Tensor

import flash_mla
from flash_mla import (
    UnsupportedError,
    backends,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_mla.backends import reference_prefill
from flash_mla.errors import from_native
from flash_mla.problem_prefill import DensePrefillBackwardProblem, DensePrefillProblem
from flash_mla.testing import (
    DensePrefillInputs,
    check_dense_prefill,
    check_dense_prefill_gradients,
    dense_prefill_gradients,
    expected_dense_prefill,
    expected_dense_prefill_gradients,
    make_dense_prefill_inputs,
    random_dense_prefill_gradients,
)

OP = "dense_prefill"
DTYPES = (torch.bfloat16, torch.float16)
MIXED = [(5, 9), (0, 3), (4, 0), (9, 5), (1, 1), (0, 0), (7, 7)]


def naive(inputs: DensePrefillInputs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out `[tokens, h_q, 128]` and lse `[tokens, h_q]` in float64, one query and head at a time; autograd follows."""
    tokens, h_q, d_qk = q.shape
    group = h_q // k.shape[1]
    zero, none = torch.zeros(128, dtype=torch.float64), torch.tensor(math.inf, dtype=torch.float64)
    out, lse = [[zero] * h_q for _ in range(tokens)], [[none] * h_q for _ in range(tokens)]
    starts_q, starts_k = inputs.cu_seqlens_qo.tolist(), inputs.cu_seqlens_kv.tolist()
    for sequence in range(len(starts_q) - 1):
        (q0, q1), (k0, k1) = starts_q[sequence : sequence + 2], starts_k[sequence : sequence + 2]
        for query in range(q0, q1):
            seen = k1 - k0 - (q1 - 1 - query) if inputs.causal else k1 - k0
            for head in range(h_q if seen > 0 else 0):
                keys, values = k[k0 : k0 + seen, head // group], v[k0 : k0 + seen, head // group]
                scores = keys @ q[query, head] / math.sqrt(d_qk)
                lse[query][head] = scores.logsumexp(0)
                out[query][head] = scores.softmax(0) @ values
    return torch.stack([torch.stack(row) for row in out]), torch.stack([torch.stack(row) for row in lse])


def doubles(inputs: DensePrefillInputs) -> list[Tensor]:
    return [tensor.detach().cpu().double() for tensor in (inputs.q, inputs.k, inputs.v)]


# ---- Outputs.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (3, 3), (4, 2), (6, 1)])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_the_truth_is_the_naive_loop(d_qk: int, h_q: int, h_kv: int, causal: bool) -> None:
    inputs = make_dense_prefill_inputs(MIXED, h_q=h_q, h_kv=h_kv, d_qk=d_qk, causal=causal)
    answer, (out, lse) = expected_dense_prefill(inputs), naive(inputs, *doubles(inputs))
    torch.testing.assert_close(answer.out, out, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(answer.lse, lse, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (3, 3), (4, 2), (6, 1), (16, 16)])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_heads(backend: Target, d_qk: int, h_q: int, h_kv: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = make_dense_prefill_inputs(
        MIXED, h_q=h_q, h_kv=h_kv, d_qk=d_qk, causal=causal, dtype=dtype, device=backend.device
    )
    check_dense_prefill(inputs)


def test_many_heads(backend: Target) -> None:
    heads = 16 if backend.interpreted else 128
    check_dense_prefill(make_dense_prefill_inputs(MIXED, h_q=heads, h_kv=heads, causal=True, device=backend.device))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [[(1, 1)], [(63, 65)], [(64, 64), (128, 128)], [(65, 63)], [(300, 700)], [(700, 300)], [(1, 900)], [(2, 2)] * 40],
)
def test_lengths(backend: Target, lengths: list[tuple[int, int]], causal: bool) -> None:
    check_dense_prefill(make_dense_prefill_inputs(lengths, h_q=2, h_kv=1, causal=causal, device=backend.device))


def test_work_is_cut_without_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make_dense_prefill_inputs([(40, 70), (3, 0), (33, 20)], causal=True)
    whole = expected_dense_prefill(inputs)
    d_out, d_lse = torch.randn(whole.out.shape), torch.randn(whole.lse.shape)
    gradients = expected_dense_prefill_gradients(inputs, d_out, d_lse)
    monkeypatch.setattr(reference_prefill, "KEYS_PER_STEP", 7)
    monkeypatch.setattr(reference_prefill, "SCRATCH_ELEMENTS", 150)
    cut = expected_dense_prefill(inputs)
    torch.testing.assert_close(cut.out, whole.out, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cut.lse, whole.lse, rtol=1e-12, atol=1e-12)
    for one, other in zip(expected_dense_prefill_gradients(inputs, d_out, d_lse), gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_queries_without_keys(backend: Target) -> None:
    """More queries than keys, an empty sequence, and tokens that no sequence has: out 0, lse +inf."""
    inputs = make_dense_prefill_inputs([(8, 3), (4, 0)], causal=True, spare=2, device=backend.device)
    out, lse = flash_attn_varlen_func(**inputs.call())
    check_dense_prefill(inputs, result=(out, lse))
    for rows in (slice(0, 5), slice(8, 14)):
        assert not out[rows].any()
        assert bool((lse[rows] == math.inf).all())
    assert bool(lse[5:8].isfinite().all())


@pytest.mark.parametrize("tokens", [0, 1, 5])
def test_the_layout_of_lse(backend: Target, tokens: int) -> None:
    inputs = make_dense_prefill_inputs([(tokens, 4)], spare=0, device=backend.device)
    out, lse = flash_attn_varlen_func(**inputs.call())
    assert out.shape == (tokens, 4, 128)
    assert lse.shape == (tokens, 4)
    assert lse.stride(0) == 1
    assert lse.dtype == torch.float32


def test_no_sequences(backend: Target) -> None:
    inputs = make_dense_prefill_inputs([], spare=3, device=backend.device)
    out, lse = flash_attn_varlen_func(**inputs.call())
    assert not out.any()
    assert bool((lse == math.inf).all())


@pytest.mark.parametrize("scale", [0.0, 0.01, 0.5])
def test_scale(backend: Target, scale: float) -> None:
    inputs = make_dense_prefill_inputs(MIXED, causal=True, device=backend.device)
    inputs.softmax_scale = scale
    check_dense_prefill(inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_neighbours_do_not_leak(backend: Target, causal: bool) -> None:
    """Values of other sequences, in the same tile of a kernel, are no number."""
    lengths = [(70, 100), (200, 131), (64, 190), (3, 1)]
    inputs = make_dense_prefill_inputs(lengths, causal=causal, device=backend.device)
    wanted = flash_attn_varlen_func(**inputs.call())
    starts_q, starts_k = inputs.cu_seqlens_qo.tolist(), inputs.cu_seqlens_kv.tolist()
    for sequence in range(len(lengths)):
        own_q = slice(starts_q[sequence], starts_q[sequence + 1])
        own_k = slice(starts_k[sequence], starts_k[sequence + 1])
        call = inputs.call()
        for name, own in (("q", own_q), ("k", own_k), ("v", own_k)):
            call[name] = torch.full_like(call[name], math.nan)
            call[name][own] = getattr(inputs, name)[own]
        for one, other in zip(flash_attn_varlen_func(**call), wanted, strict=True):
            assert torch.equal(bits(one[own_q]), bits(other[own_q]))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_many_tiles(backend: Target, d_qk: int, causal: bool) -> None:
    lengths = [(257, 400), (129, 64), (64, 129)]
    if backend.on_gpu:
        lengths += [(1000, 3000), (3000, 1000), (2049, 2048), (128, 128), (1, 5000)] + [(127, 129)] * 30
    check_dense_prefill(
        make_dense_prefill_inputs(lengths, h_q=4, h_kv=2, d_qk=d_qk, causal=causal, device=backend.device)
    )


@pytest.mark.gpu
@pytest.mark.parametrize("values", [[5, -7, 10**9, 3, 200], [0, 300, 0, 300, 0], [-(2**31), 2**31 - 1, 9, 0, -1]])
@pytest.mark.parametrize("which", ["q", "kv", "both"])
def test_nonsense_running_lengths_reach_nothing_outside(gpu: Target, which: str, values: list[int]) -> None:
    """What comes out means nothing, but it is written, and made of the tensors' own values."""
    inputs = make_dense_prefill_inputs([(60, 90), (70, 10), (80, 50), (90, 150)], spare=0, causal=True, device="cuda")
    nonsense = torch.tensor(values, dtype=torch.int32, device="cuda")
    if which != "kv":
        inputs.cu_seqlens_qo = nonsense
    if which != "q":
        inputs.cu_seqlens_kv = nonsense
    out, lse = flash_attn_varlen_func(**inputs.call())
    assert bool(out.isfinite().all())
    assert bool((lse.isfinite() | (lse == math.inf)).all())
    assert float(out.abs().max()) <= float(inputs.v.abs().max()) * 1.01


@pytest.mark.gpu
def test_a_graph_is_right_for_other_lengths(gpu: Target) -> None:
    inputs = make_dense_prefill_inputs([(300, 300), (500, 700), (30, 1)], spare=0, causal=True, device="cuda")
    flash_attn_varlen_func(**inputs.call())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attn_varlen_func(**inputs.call())
    for queries, keys in (
        ([0, 300, 800, 830], [0, 300, 1000, 1001]),
        ([0, 1, 2, 830], [0, 0, 5, 1001]),
        ([0, 10, 10, 20], [0, 1001, 1001, 1001]),
        ([0, 0, 0, 0], [0, 0, 0, 0]),
    ):
        inputs.cu_seqlens_qo.copy_(torch.tensor(queries, dtype=torch.int32))
        inputs.cu_seqlens_kv.copy_(torch.tensor(keys, dtype=torch.int32))
        for tensor in captured:
            tensor.fill_(math.nan)
        graph.replay()
        inputs.max_seqlen_qo, inputs.max_seqlen_kv = 1000, 1001
        check_dense_prefill(inputs, result=captured)
        for one, other in zip(captured, flash_attn_varlen_func(**inputs.call()), strict=True):
            assert torch.equal(bits(one), bits(other))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["k", "v"])
def test_expanded_heads_are_declined(cuda: Target, name: str) -> None:
    inputs = make_dense_prefill_inputs([(30, 40)], h_q=4, h_kv=4, device="cuda")
    setattr(inputs, name, getattr(inputs, name)[:, :1].expand(-1, 4, -1))
    with pytest.raises(UnsupportedError, match=f"{name} must not be expanded, got stride 0 in dimension 1"):
        flash_attn_varlen_func(**inputs.call())


@pytest.mark.gpu
def test_many_short_sequences(gpu: Target) -> None:
    lengths = [(n % 5, n % 7) for n in range(20_000)]
    inputs = make_dense_prefill_inputs(lengths, h_q=1, h_kv=1, d_qk=128, causal=True, device="cuda")
    out, lse = flash_attn_varlen_func(**inputs.call())
    # Every 35 sequences the lengths repeat: each part alone gives the same bits.
    for first in (0, 35 * 100, 35 * 571 - 35):
        part_q, part_k = (
            running[first : first + 36].tolist() for running in (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)
        )
        rows_q, rows_k = slice(part_q[0], part_q[-1]), slice(part_k[0], part_k[-1])
        running_q, running_k = (
            torch.tensor([end - part[0] for end in part], dtype=torch.int32, device="cuda") for part in (part_q, part_k)
        )
        part = flash_attn_varlen_func(
            inputs.q[rows_q], inputs.k[rows_k], inputs.v[rows_k], running_q, running_k, 4, 6, causal=True
        )
        assert torch.equal(bits(part[0]), bits(out[rows_q]))
        assert torch.equal(bits(part[1]), bits(lse[rows_q]))


@pytest.mark.gpu
def test_tensors_beyond_4_gib(gpu: Target) -> None:
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    heads, length, sequences = 128, 1000, 90
    tokens = length * sequences
    generator = torch.Generator("cuda").manual_seed(0)

    def rows(width: int) -> Tensor:
        values = torch.empty((tokens, heads, width), dtype=torch.bfloat16, device="cuda")
        return values.normal_(generator=generator)

    q, k, v = rows(192), rows(192), rows(128)
    assert q.numel() > 2**31
    running = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    out, lse = flash_attn_varlen_func(q, k, v, running, running, length, length, causal=True)
    alone = int32(0, length).cuda()
    for sequence in (0, sequences // 2, sequences - 1):
        own = slice(sequence * length, (sequence + 1) * length)
        part = flash_attn_varlen_func(q[own], k[own], v[own], alone, alone, length, length, causal=True)
        assert torch.equal(bits(part[0]), bits(out[own]))
        assert torch.equal(bits(part[1]), bits(lse[own]))
    inputs = DensePrefillInputs(q[own][:, :2], k[own][:, :2], v[own][:, :2], alone, alone, length, length, causal=True)
    check_dense_prefill(inputs, result=(out[own][:, :2], lse[own][:, :2]))


def test_peaked_scores(backend: Target) -> None:
    check_dense_prefill(make_dense_prefill_inputs([(30, 200)], spread=8.0, device=backend.device))


def test_strided_tensors(backend: Target) -> None:
    inputs = make_dense_prefill_inputs(MIXED, causal=True, device=backend.device)
    wanted = flash_attn_varlen_func(**inputs.call())
    for name in ("q", "k", "v"):
        tensor = getattr(inputs, name)
        tokens, heads, width = tensor.shape
        room = torch.full((tokens, heads + 1, width + 8), math.nan, dtype=tensor.dtype, device=backend.device)
        room[:, 1:, :width] = tensor
        setattr(inputs, name, room[:, 1:, :width])
    for one, other in zip(flash_attn_varlen_func(**inputs.call()), wanted, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("d_qk", [192, 128])
def test_packed_forms(backend: Target, d_qk: int) -> None:
    lengths = [(5, 5), (0, 0), (9, 9)]
    inputs = make_dense_prefill_inputs(lengths, h_q=3, h_kv=3, d_qk=d_qk, causal=True, device=backend.device)
    wanted = flash_attn_varlen_func(**inputs.call())
    qkv = torch.cat((inputs.q, inputs.k, inputs.v), -1)
    packed = flash_attn_varlen_qkvpacked_func(qkv, inputs.cu_seqlens_qo, 9, d_qk, causal=True)
    kv = torch.cat((inputs.k, inputs.v), -1)
    cu = (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv)
    half_packed = flash_attn_varlen_kvpacked_func(inputs.q, kv, *cu, 9, 9, d_qk, causal=True)
    for result in (packed, half_packed):
        for one, other in zip(result, wanted, strict=True):
            assert torch.equal(bits(one), bits(other))


def test_more_arguments_than_matter(backend: Target) -> None:
    inputs = make_dense_prefill_inputs(MIXED, device=backend.device)
    wanted = flash_attn_varlen_func(**inputs.call())
    call = {**inputs.call(), "max_seqlen_qo": 1000, "max_seqlen_kv": 1000}
    for options in ({"deterministic": True}, {"is_varlen": False}, {"dropout_p": 0.0}):
        for one, other in zip(flash_attn_varlen_func(**call, **options), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- Gradients.


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(2, 2), (4, 2), (6, 1)])
@pytest.mark.parametrize(("d_qk", "dtype"), [(192, torch.bfloat16), (128, torch.float16)])
def test_gradients(backend: Target, d_qk: int, dtype: torch.dtype, h_q: int, h_kv: int, causal: bool) -> None:
    inputs = make_dense_prefill_inputs(
        MIXED, h_q=h_q, h_kv=h_kv, d_qk=d_qk, dtype=dtype, causal=causal, device=backend.device
    )
    leaves = [inputs.q, inputs.k, inputs.v]
    for leaf in leaves:
        leaf.requires_grad_()
    out, lse = flash_attn_varlen_func(**inputs.call())
    generator = torch.Generator().manual_seed(3)
    d_out = torch.randn(out.shape, generator=generator).to(dtype).to(backend.device)
    d_lse = torch.randn(lse.shape, generator=generator).to(backend.device)
    gradients = torch.autograd.grad((out, lse), leaves, (d_out, d_lse))

    exact = [leaf.requires_grad_() for leaf in doubles(inputs)]
    true_out, true_lse = naive(inputs, *exact)
    finite = true_lse.isfinite()
    total = (true_out * d_out.cpu().double()).sum() + (true_lse * d_lse.cpu())[finite].sum()
    for leaf, gradient, true in zip(leaves, gradients, torch.autograd.grad(total, exact), strict=True):
        assert gradient.dtype == leaf.dtype
        assert not bool(gradient.isnan().any())
        assert not gradient.cpu()[true == 0].any()
        error = (gradient.cpu().double() - true).abs().max()
        assert error <= torch.finfo(dtype).eps * true.abs().max()


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv"), [(1, 1), (3, 1), (8, 2)])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_gradients_of_heads(backend: Target, d_qk: int, h_q: int, h_kv: int, causal: bool, dtype: torch.dtype) -> None:
    inputs = make_dense_prefill_inputs(
        MIXED, h_q=h_q, h_kv=h_kv, d_qk=d_qk, causal=causal, dtype=dtype, device=backend.device
    )
    for deterministic in (False, True):
        check_dense_prefill_gradients(inputs, deterministic=deterministic)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d_qk", [192, 128])
def test_gradients_over_many_tiles(backend: Target, d_qk: int, causal: bool) -> None:
    lengths = [(65, 130), (64, 129), (129, 64), (70, 0)]
    if backend.on_gpu:
        lengths += [(63, 65), (1, 900), (900, 1), (300, 700), (700, 300), (1000, 1000), (128, 128)] + [(2, 2)] * 40
    inputs = make_dense_prefill_inputs(lengths, h_q=4, h_kv=2, d_qk=d_qk, causal=causal, device=backend.device)
    for deterministic in (False, True):
        check_dense_prefill_gradients(inputs, deterministic=deterministic)


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_gradients_with_a_scale(backend: Target, scale: float) -> None:
    inputs = make_dense_prefill_inputs(MIXED, causal=True, device=backend.device)
    inputs.softmax_scale = scale
    check_dense_prefill_gradients(inputs)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_neighbours_do_not_leak(backend: Target, causal: bool) -> None:
    """Other sequences, in the same tile of a kernel, hold no numbers, and neither do their gradients."""
    lengths = [(70, 100), (200, 131), (64, 190), (3, 1)]
    inputs = make_dense_prefill_inputs(lengths, causal=causal, device=backend.device)
    d_out, d_lse = random_dense_prefill_gradients(inputs)
    wanted = dense_prefill_gradients(inputs, d_out, d_lse, deterministic=True)
    starts_q, starts_k = inputs.cu_seqlens_qo.tolist(), inputs.cu_seqlens_kv.tolist()
    for sequence in range(len(lengths)):
        own_q = slice(starts_q[sequence], starts_q[sequence + 1])
        own_k = slice(starts_k[sequence], starts_k[sequence + 1])

        def alone(tensor: Tensor, own: slice) -> Tensor:
            poisoned = torch.full_like(tensor, math.nan)
            poisoned[own] = tensor[own]
            return poisoned

        q, k, v = alone(inputs.q, own_q), alone(inputs.k, own_k), alone(inputs.v, own_k)
        poisoned = replace(inputs, q=q, k=k, v=v)
        gradients = dense_prefill_gradients(poisoned, alone(d_out, own_q), alone(d_lse, own_q), deterministic=True)
        for own, one, other in zip((own_q, own_k, own_k), gradients, wanted, strict=True):
            assert torch.equal(bits(one[own]), bits(other[own]))


def test_queries_without_keys_have_no_gradients(backend: Target) -> None:
    """Whatever stands in their rows."""
    inputs = make_dense_prefill_inputs([(100, 30), (6, 0)], causal=True, spare=0, device=backend.device)
    d_out, d_lse = random_dense_prefill_gradients(inputs)
    wanted = dense_prefill_gradients(inputs, d_out, d_lse)
    for rows in (slice(0, 70), slice(100, 106)):
        assert not wanted[0][rows].any()
        for tensor in (inputs.q, d_out, d_lse):
            tensor[rows] = math.nan
    for one, other in zip(dense_prefill_gradients(inputs, d_out, d_lse), wanted, strict=True):
        assert torch.equal(bits(one), bits(other))


@pytest.mark.parametrize("lengths", [[], [(0, 5)], [(5, 0)], [(0, 0)]])
@pytest.mark.parametrize("spare", [0, 3])
def test_gradients_where_nothing_meets(backend: Target, lengths: list[tuple[int, int]], spare: int) -> None:
    inputs = make_dense_prefill_inputs(lengths, spare=spare, device=backend.device)
    for gradient in dense_prefill_gradients(inputs, *random_dense_prefill_gradients(inputs)):
        assert not gradient.any()


def test_gradients_of_strided_tensors(backend: Target) -> None:
    inputs = make_dense_prefill_inputs(MIXED, causal=True, device=backend.device)
    d_out, d_lse = random_dense_prefill_gradients(inputs)
    wanted = dense_prefill_gradients(inputs, d_out, d_lse, deterministic=True)

    def strided(tensor: Tensor) -> Tensor:
        tokens, heads, width = tensor.shape
        room = torch.full((tokens, heads + 1, width + 8), math.nan, dtype=tensor.dtype, device=backend.device)
        room[:, 1:, :width] = tensor
        return room[:, 1:, :width]

    for name in ("q", "k", "v"):
        setattr(inputs, name, strided(getattr(inputs, name)))
    d_lse = d_lse.repeat_interleave(2, 1)[:, ::2]
    for one, other in zip(
        dense_prefill_gradients(inputs, strided(d_out), d_lse, deterministic=True), wanted, strict=True
    ):
        assert torch.equal(bits(one), bits(other))


def test_gradients_of_a_sum(backend: Target) -> None:
    """Gradients of out and lse that are expanded from one number."""
    inputs = make_dense_prefill_inputs([(70, 130), (5, 64)], spare=0, device=backend.device)
    leaf = inputs.q.requires_grad_()
    out, lse = flash_attn_varlen_func(**inputs.call())
    (gradient,) = torch.autograd.grad(out.sum(dtype=torch.float32) + lse.sum(), leaf)
    ones = torch.ones_like(out), torch.ones_like(lse)
    out, lse = flash_attn_varlen_func(**inputs.call())
    (wanted,) = torch.autograd.grad((out, lse), leaf, ones)
    torch.testing.assert_close(gradient, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("h_q", "h_kv", "d_qk"), [(8, 8, 192), (6, 2, 192), (4, 4, 128)])
def test_deterministic_gradients(cuda: Target, h_q: int, h_kv: int, d_qk: int, causal: bool) -> None:
    lengths = [(1500, 1500), (300, 2000), (2000, 300), (64, 128)] + [(130, 257)] * 9
    inputs = make_dense_prefill_inputs(lengths, h_q=h_q, h_kv=h_kv, d_qk=d_qk, causal=causal, device="cuda")
    gradients = random_dense_prefill_gradients(inputs)
    first = dense_prefill_gradients(inputs, *gradients, deterministic=True)
    for _ in range(5):
        for one, other in zip(dense_prefill_gradients(inputs, *gradients, deterministic=True), first, strict=True):
            assert torch.equal(bits(one), bits(other))
    check_dense_prefill_gradients(inputs, result=first)


@pytest.mark.gpu
@pytest.mark.parametrize("values", [[5, -7, 10**9, 3, 200], [0, 300, 0, 300, 0], [-(2**31), 2**31 - 1, 9, 0, -1]])
@pytest.mark.parametrize("which", ["q", "kv", "both"])
def test_gradients_of_nonsense_running_lengths_are_numbers(cuda: Target, which: str, values: list[int]) -> None:
    inputs = make_dense_prefill_inputs([(60, 90), (70, 10), (80, 50), (90, 150)], spare=0, causal=True, device="cuda")
    gradients = random_dense_prefill_gradients(inputs)
    nonsense = torch.tensor(values, dtype=torch.int32, device="cuda")
    if which != "kv":
        inputs.cu_seqlens_qo = nonsense
    if which != "q":
        inputs.cu_seqlens_kv = nonsense
    for gradient in dense_prefill_gradients(inputs, *gradients):
        assert bool(gradient.isfinite().all())


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_of_gradients_is_right_for_other_lengths(cuda: Target, deterministic: bool) -> None:
    inputs = make_dense_prefill_inputs([(300, 300), (500, 700), (30, 1)], spare=0, causal=True, device="cuda")
    inputs.max_seqlen_qo, inputs.max_seqlen_kv = 1000, 1001
    given = random_dense_prefill_gradients(inputs)
    dense_prefill_gradients(inputs, *given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = dense_prefill_gradients(inputs, *given, deterministic=deterministic)
    for queries, keys in (
        ([0, 300, 800, 830], [0, 300, 1000, 1001]),
        ([0, 1, 2, 830], [0, 0, 5, 1001]),
        ([0, 10, 10, 830], [0, 1001, 1001, 1001]),
        ([0, 0, 0, 830], [0, 0, 0, 0]),
    ):
        inputs.cu_seqlens_qo.copy_(torch.tensor(queries, dtype=torch.int32))
        inputs.cu_seqlens_kv.copy_(torch.tensor(keys, dtype=torch.int32))
        for tensor in captured:
            tensor.fill_(math.nan)
        graph.replay()
        check_dense_prefill_gradients(inputs, result=captured)


@pytest.mark.gpu
def test_gradients_of_tensors_beyond_4_gib(cuda: Target) -> None:
    if torch.cuda.mem_get_info()[0] < 60 << 30:
        pytest.skip("needs 60 GiB of free device memory")
    heads, length, sequences = 128, 1000, 90
    tokens = length * sequences
    generator = torch.Generator("cuda").manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.empty((tokens, heads, width), dtype=torch.bfloat16, device="cuda").normal_(generator=generator)

    running = torch.arange(0, tokens + 1, length, dtype=torch.int32, device="cuda")
    inputs = DensePrefillInputs(rows(192), rows(192), rows(128), running, running, length, length, causal=True)
    d_out, d_lse = rows(128), torch.zeros((1, 1), device="cuda").expand(tokens, heads)
    gradients = dense_prefill_gradients(inputs, d_out, d_lse, deterministic=True)
    for sequence in (0, sequences // 2, sequences - 1):
        own = slice(sequence * length, (sequence + 1) * length)
        part = dense_prefill_gradients(inputs.sequence(sequence), d_out[own], d_lse[own], deterministic=True)
        for one, other in zip(part, gradients, strict=True):
            assert torch.equal(bits(one), bits(other[own]))


def test_the_true_gradients_are_those_of_the_naive_loop() -> None:
    inputs = make_dense_prefill_inputs(MIXED, causal=True)
    exact = [leaf.requires_grad_() for leaf in doubles(inputs)]
    out, lse = naive(inputs, *exact)
    d_out, d_lse = torch.randn(out.shape, dtype=torch.float64), torch.randn(lse.shape, dtype=torch.float64)
    wanted = torch.autograd.grad((out * d_out).sum() + (lse * d_lse)[lse.isfinite()].sum(), exact)
    for one, other in zip(expected_dense_prefill_gradients(inputs, d_out, d_lse), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_repeatable(backend: Target, deterministic: bool) -> None:
    inputs = make_dense_prefill_inputs([(70, 130), (5, 64)], causal=True, device=backend.device)
    leaves = [inputs.q, inputs.k, inputs.v]
    for leaf in leaves:
        leaf.requires_grad_()

    def gradients() -> tuple[Tensor, ...]:
        out, _ = flash_attn_varlen_func(**inputs.call(), deterministic=deterministic)
        return torch.autograd.grad(out.float().square().sum(), leaves)

    first = gradients()
    for one, other in zip(gradients(), first, strict=True):
        if deterministic or not backend.is_cuda:
            assert torch.equal(bits(one), bits(other))
        else:
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_gradients_of_a_packed_tensor(backend: Target) -> None:
    inputs = make_dense_prefill_inputs([(5, 5), (9, 9)], h_q=2, h_kv=2, spare=0, device=backend.device)
    qkv = torch.cat((inputs.q, inputs.k, inputs.v), -1).requires_grad_()
    out, _ = flash_attn_varlen_qkvpacked_func(qkv, inputs.cu_seqlens_qo, 9, 192)
    (packed,) = torch.autograd.grad(out.float().square().sum(), qkv)
    leaves = [tensor.requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)]
    out, _ = flash_attn_varlen_func(**inputs.call())
    apart = torch.autograd.grad(out.float().square().sum(), leaves)
    assert torch.equal(packed, torch.cat(apart, -1))


def test_one_result_alone_has_gradients(backend: Target) -> None:
    inputs = make_dense_prefill_inputs(MIXED, spare=0, device=backend.device)
    inputs.q.requires_grad_()
    out, lse = flash_attn_varlen_func(**inputs.call())
    (of_out,) = torch.autograd.grad(out.float().sum(), inputs.q, retain_graph=True)
    (of_lse,) = torch.autograd.grad(lse[lse.isfinite()].sum(), inputs.q)
    assert bool(of_out.any())
    assert bool(of_lse.any())
    assert bool(of_out.isfinite().all())
    assert bool(of_lse.isfinite().all())


def test_opcheck(backend: Target) -> None:
    inputs = make_dense_prefill_inputs([(3, 5), (0, 2)], spare=0, causal=True, device=backend.device)
    tensors = [tensor.requires_grad_() for tensor in (inputs.q, inputs.k, inputs.v)]
    lengths = (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv, 3, 5)
    for prefix in ("triton_",) if backend.name == "triton" else ("", "reference_"):
        operator = getattr(torch.ops.flash_mla, f"{prefix}dense_prefill").default
        torch.library.opcheck(operator, (*tensors, *lengths, 0.07, True, True))


def test_opcheck_of_gradients(backend: Target) -> None:
    inputs = make_dense_prefill_inputs([(3, 5), (0, 2)], spare=0, causal=True, device=backend.device)
    lengths = (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv, 3, 5)
    out, lse = flash_attn_varlen_func(**inputs.call())
    arguments = (*random_dense_prefill_gradients(inputs), inputs.q, inputs.k, inputs.v, out, lse, *lengths)
    for prefix in ("reference_",) if backend.name == "triton" else ("", "reference_"):
        operator = getattr(torch.ops.flash_mla, f"{prefix}dense_prefill_backward").default
        torch.library.opcheck(operator, (*arguments, 0.07, True, True))


def test_compiled_without_graph_breaks(backend: Target) -> None:
    inputs = make_dense_prefill_inputs(MIXED, spare=0, causal=True, device=backend.device)

    call = inputs.call()

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = flash_attn_varlen_func(**{**call, "q": q})
        return out * 2, lse

    torch._dynamo.reset()
    with backends.use(None):
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if backend.is_cuda else "aot_eager")
        q = inputs.q.clone().requires_grad_()
        for one, other in zip(compiled(q), step(inputs.q), strict=True):
            torch.testing.assert_close(one, other)
        out, _ = compiled(q)
        (gradient,) = torch.autograd.grad(out.float().square().sum(), q)
        assert bool(gradient.any())


# ---- Errors.


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


WRONG = {
    "dropout": ({"dropout_p": lambda p: 0.1}, ValueError, r"dropout_p: wanted 0.0 .*, got 0.1"),
    "dropout type": ({"dropout_p": lambda p: None}, TypeError, "dropout_p: wanted a finite number, got NoneType"),
    "q dtype": ({"q": lambda q: q.float()}, TypeError, "q: wanted torch.bfloat16 or torch.float16, got torch.float32"),
    "q dims": ({"q": lambda q: q[None]}, ValueError, r"q: wanted 3 dimensions \[tokens_q, h_q, d_qk\], got shape"),
    "q None": ({"q": lambda q: None}, TypeError, r"q: wanted a tensor \[tokens_q, h_q, d_qk\], got None"),
    "q d_qk": ({"q": lambda q: q[..., :64]}, ValueError, r"q: wanted d_qk \(last dimension\) 192 or 128, got 64"),
    "q heads": ({"q": lambda q: q[:, :3]}, ValueError, "q: wanted h_q that is a multiple of h_kv = 2, got h_q = 3"),
    "q stride": ({"q": lambda q: q.repeat(1, 1, 2)[..., ::2]}, ValueError, "q: wanted a contiguous last dimension"),
    "k dtype": ({"k": lambda k: k.half()}, TypeError, "k: wanted torch.bfloat16, like q, got torch.float16"),
    "k d_qk": ({"k": lambda k: k[..., :128]}, ValueError, "k: wanted a last dimension of d_qk = 192, got 128"),
    "v d_v": ({"v": lambda v: v[..., :64]}, ValueError, "v: wanted a last dimension of d_v = 128, got 64"),
    "v heads": (
        {"v": lambda v: v[:, :1]},
        ValueError,
        r"v: wanted \[tokens_kv, h_kv\] = \[18, 2\], like k, got \[18, 1\]",
    ),
    "v tokens": (
        {"v": lambda v: v[:9]},
        ValueError,
        r"v: wanted \[tokens_kv, h_kv\] = \[18, 2\], like k, got \[9, 2\]",
    ),
    "cu dtype": (
        {"cu_seqlens_qo": lambda c: c.long()},
        TypeError,
        "cu_seqlens_qo: wanted torch.int32, got torch.int64",
    ),
    "cu dims": (
        {"cu_seqlens_qo": lambda c: c[None]},
        ValueError,
        r"cu_seqlens_qo: wanted 1 dimensions \[sequences \+ 1\]",
    ),
    "cu None": (
        {"cu_seqlens_kv": lambda c: None},
        TypeError,
        r"cu_seqlens_kv: wanted a tensor \[sequences \+ 1\], got",
    ),
    "cu empty": ({"cu_seqlens_qo": lambda c: c[:0]}, ValueError, r"cu_seqlens_qo: wanted shape \[sequences \+ 1\], at"),
    "cu count": (
        {"cu_seqlens_kv": lambda c: c[:-1]},
        ValueError,
        r"cu_seqlens_kv: wanted shape \[sequences \+ 1\] = \[3\], like cu_seqlens_qo, got \[2\]",
    ),
    "max type": ({"max_seqlen_qo": lambda m: 7.5}, TypeError, "max_seqlen_qo: wanted an int, got float"),
    "max negative": ({"max_seqlen_kv": lambda m: -1}, ValueError, "max_seqlen_kv: wanted at least 0, got -1"),
    "scale": ({"softmax_scale": lambda s: math.nan}, ValueError, "softmax_scale: wanted a finite number, got nan"),
    "causal": ({"causal": lambda c: "yes"}, TypeError, "causal: wanted a bool, got str"),
    "deterministic": ({"deterministic": lambda c: "yes"}, TypeError, "deterministic: wanted a bool, got str"),
    "is_varlen": ({"is_varlen": lambda c: 1}, TypeError, "is_varlen: wanted a bool, got int"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(backend: Target, case: str) -> None:
    changes, error, text = WRONG[case]
    inputs = make_dense_prefill_inputs([(5, 9), (3, 6)], device=backend.device)
    call = inputs.call()
    spoiled = {name: change(call.get(name)) for name, change in changes.items()}
    with pytest.raises(error, match=text):
        flash_attn_varlen_func(**{**call, **spoiled})
    flash_attn_varlen_func(**call)


WRONG_RESULTS = {
    "d_out dtype": (0, lambda d: d.float(), TypeError, "d_out must have dtype BFloat16, got Float"),
    "d_out heads": (
        0,
        lambda d: d[:, :1],
        ValueError,
        r"d_out must have shape \[tokens_q, h_q, 128\] = \[11, 4, ...\]",
    ),
    "d_out width": (0, lambda d: d[..., :64], ValueError, r"d_out must have shape .*, so size 128 in dimension 2"),
    "d_out stride": (0, lambda d: d.repeat(1, 1, 2)[..., ::2], ValueError, "d_out must be contiguous in its last"),
    "d_out expanded": (0, lambda d: d[:, :1].expand(-1, 4, -1), UnsupportedError, "d_out must not be expanded"),
    "d_lse dtype": (1, lambda d: d.double(), TypeError, "d_lse must have dtype Float, got Double"),
    "out tokens": (5, lambda out: out[1:], ValueError, r"out must have shape \[tokens_q, h_q, 128\] = \[11, 4"),
    "lse layout": (6, lambda lse: lse.contiguous(), ValueError, "out and lse must be laid out as dense_prefill gives"),
    "q device": (2, lambda q: q.cpu(), ValueError, "q must be on CUDA"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", WRONG_RESULTS)
def test_wrong_calls_for_gradients(cuda: Target, case: str) -> None:
    position, change, error, text = WRONG_RESULTS[case]
    inputs = make_dense_prefill_inputs([(5, 9), (3, 6)], device="cuda")
    lengths = (inputs.cu_seqlens_qo, inputs.cu_seqlens_kv, 5, 9)
    out, lse = flash_attn_varlen_func(**inputs.call())
    arguments = [*random_dense_prefill_gradients(inputs), inputs.q, inputs.k, inputs.v, out, lse, *lengths]
    arguments[position] = change(arguments[position])
    with pytest.raises(Exception, match=text) as caught:
        torch.ops.flash_mla.dense_prefill_backward(*arguments, 0.07, True, False)
    assert isinstance(from_native(caught.value), error)


def test_wrong_running_lengths() -> None:
    """The reference reads them, and says so; a kernel cannot."""
    inputs = make_dense_prefill_inputs([(5, 9), (3, 6)])
    with backends.use("reference"):
        for wrong in (int32(0, 5, 12), int32(1, 5, 8), int32(0, 5, 3)):
            with pytest.raises(
                ValueError, match="cu_seqlens_qo: wanted running lengths from 0 to at most 11 tokens, got"
            ):
                flash_attn_varlen_func(**{**inputs.call(), "cu_seqlens_qo": wrong, "max_seqlen_qo": 99})
        with pytest.raises(ValueError, match="max_seqlen_kv: wanted at least the longest sequence, got 8 for 9"):
            flash_attn_varlen_func(**{**inputs.call(), "max_seqlen_kv": 8})


def test_wrong_packed_tensors(backend: Target) -> None:
    qkv = torch.zeros((5, 2, 500), dtype=torch.bfloat16, device=backend.device)
    cu = int32(0, 5).to(backend.device)
    with pytest.raises(
        ValueError, match=r"qkv: wanted a last dimension of head_dim_qk = 192 \+ .* \+ 128 = 512, got 500"
    ):
        flash_attn_varlen_qkvpacked_func(qkv, cu, 5, 192)
    with pytest.raises(ValueError, match="head_dim_qk: wanted 128 or 192, got 64"):
        flash_attn_varlen_qkvpacked_func(qkv, cu, 5, 64)
    with pytest.raises(ValueError, match=r"kv: wanted a last dimension of head_dim_qk = 192 \+ 128 = 320, got 500"):
        flash_attn_varlen_kvpacked_func(qkv[..., :192], qkv, cu, cu, 5, 5, 192)
    with pytest.raises(TypeError, match=r"qkv: wanted a tensor \[tokens, heads, 512\], got None"):
        flash_attn_varlen_qkvpacked_func(None, cu, 5, 192)


BLACKWELL = {
    "bf16 192": ({}, "bf16_192: "),
    "bf16 128": ({"d_qk": 128, "softmax_scale": 128**-0.5}, "bf16_128: "),
    "fp16 192, a group of heads, SM103": (
        {"dtype": torch.float16, "h_kv": 1, "compute_capability": 103},
        "fp16_192: ",
    ),
    "fp16 128, not causal": ({"dtype": torch.float16, "d_qk": 128, "causal": False}, "fp16_128: "),
    "no scale": ({"softmax_scale": 0.0}, "bf16_192: softmax_scale must be positive"),
    "negative scale": ({"softmax_scale": -0.1}, "bf16_192: softmax_scale must be positive"),
    "another d_qk": ({"d_qk": 64}, "bf16_192: d_qk must be 192"),
    "another d_v": ({"d_v": 192}, "bf16_192: d_v must be 128"),
    "SM90": (
        {"compute_capability": 90},
        "bf16_192: runs on compute capability 10.0 and 10.3 only, and has not been run on Blackwell hardware",
    ),
    "SM120": (
        {"compute_capability": 120},
        "bf16_192: runs on compute capability 10.0 and 10.3 only, and has not been run on Blackwell hardware",
    ),
}


@pytest.mark.skipif("100f" not in flash_mla.build_info().get("archs", ""), reason="no kernels for SM100 are built")
@pytest.mark.parametrize("case", BLACKWELL)
@pytest.mark.parametrize("problem_type", [DensePrefillProblem, DensePrefillBackwardProblem])
def test_the_table_of_blackwell(problem_type: type[DensePrefillProblem], case: str) -> None:
    changes, wanted = BLACKWELL[case]
    problem = problem_type("cuda", 100, torch.bfloat16, 4, 16, 4, 192, 128, True, False, False, 192**-0.5)
    problem = replace(problem, **changes)
    table = backends.cuda.kernel_table(problem)
    kernel, _, reason = wanted.partition(": ")
    backward = isinstance(problem, DensePrefillBackwardProblem)
    name = f"sm100_dense_prefill_backward_{kernel}" if backward else f"sm100_dense_prefill_{kernel}"
    assert table[name] == reason
    takes = [name for name, why_not in table.items() if why_not == "" and name.startswith("sm100")]
    assert takes == ([name] if reason == "" else [])
    if reason == "":
        assert backends.select(problem) is backends.CUDA


@pytest.mark.skipif("100f" not in flash_mla.build_info().get("archs", ""), reason="no kernels for SM100 are built")
@pytest.mark.parametrize("h_kv", [65536, 65537])
def test_gradients_on_blackwell_of_very_many_key_heads(h_kv: int) -> None:
    problem = DensePrefillBackwardProblem(
        "cuda", 100, torch.bfloat16, 1, h_kv, h_kv, 192, 128, True, True, True, 192**-0.5
    )
    reason = backends.cuda.kernel_table(problem)["sm100_dense_prefill_backward_bf16_192"]
    assert reason == ("" if h_kv == 65536 else "h_kv must be at most 65536")


def test_the_cuda_backend_says_why_not() -> None:
    inputs = make_dense_prefill_inputs(MIXED)
    with (
        backends.use("cuda"),
        pytest.raises(UnsupportedError, match="dense prefill: no backend takes the problem; cuda"),
    ):
        flash_attn_varlen_func(**inputs.call())
    reason = flash_mla.why_not("dense_prefill", **inputs.call())
    assert reason is not None
    assert reason.startswith("cuda: the tensors are on cpu; triton: ")
