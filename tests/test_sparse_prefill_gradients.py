"""Gradients of flash_mla_sparse_fwd on every backend."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import Target
from test_dense_decode import bits
from test_sparse_prefill import naive_attention
from torch import Tensor

import flash_mla
from flash_mla import KVFormat, SparsePrefillBackwardProblem, UnsupportedError, backends, flash_mla_sparse_fwd
from flash_mla.errors import from_native
from flash_mla.testing import (
    SparsePrefillInputs,
    check_sparse_prefill_gradients,
    expected_sparse_prefill_gradients,
    make_sparse_prefill_inputs,
    random_sparse_prefill_gradients,
    sparse_prefill_gradients,
)

OP = "sparse_prefill_backward"


def make(s_q: int, **options: object) -> SparsePrefillInputs:
    return make_sparse_prefill_inputs(s_q, **{"lengths": "token", "invalid": 0.2, **options})


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(bits(tensor), bits(other[name])), name


def operator_arguments(inputs: SparsePrefillInputs, deterministic: bool = False) -> list[object]:
    """Of `torch.ops.flash_mla.sparse_prefill_backward`."""
    cache = inputs.primary.cache.unsqueeze(1)
    selected = (inputs.q, cache, inputs.primary.indices, inputs.primary.lengths, None, None, None, inputs.attn_sink)
    formats = ("BF16", None)
    options = (inputs.sm_scale, "e", deterministic)
    out, _, lse = torch.ops.flash_mla.sparse_prefill(*selected, *formats, inputs.d_v, *options)
    return [*random_sparse_prefill_gradients(inputs), *selected, *formats, *options, out, lse]


def test_the_true_gradients_are_those_of_the_naive_loop() -> None:
    inputs = make(6, h_q=3, topk=9, page=4, sink=True)
    exact = [each.double().requires_grad_() for each in (inputs.q, inputs.primary.cache, inputs.attn_sink)]
    out, lse = naive_attention(exact[0], [exact[1]], inputs, exact[2])
    d_out, d_lse = (gradient.nan_to_num(0.0).double() for gradient in random_sparse_prefill_gradients(inputs))
    wanted = torch.autograd.grad((out * d_out).sum() + (lse * d_lse)[lse.isfinite()].sum(), exact)
    truth = expected_sparse_prefill_gradients(inputs, d_out, d_lse)
    for one, other in zip(truth.values(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


# ---- Shapes and options.


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("h_q", [1, 3, 16, 64, 65, 128])
def test_heads(backend: Target, h_q: int, d_qk: int, sink: bool, deterministic: bool) -> None:
    inputs = make(40 if backend.on_gpu else 3, h_q=h_q, topk=150, d_qk=d_qk, sink=sink, device=backend.device)
    backend.require_kernel(OP, **inputs.call())
    check_sparse_prefill_gradients(inputs, deterministic=deterministic)


@pytest.mark.parametrize("topk", [1, 2, 63, 64, 65, 513, 2048])
def test_topk(backend: Target, topk: int) -> None:
    check_sparse_prefill_gradients(make(3, h_q=4, topk=topk, lengths="none", device=backend.device))


@pytest.mark.parametrize("deterministic", [False, True])
def test_no_queries(backend: Target, deterministic: bool) -> None:
    inputs = make(1, h_q=4, topk=20, lengths="none", sink=True, device=backend.device)
    inputs.q, inputs.primary = inputs.q[:0], replace(inputs.primary, indices=inputs.primary.indices[:0])
    none = inputs.q.new_empty((0, 4, 512)), inputs.q.new_empty((0, 4), dtype=torch.float32)
    gradients = sparse_prefill_gradients(inputs, *none, deterministic=deterministic)
    assert gradients["kv"].shape == inputs.primary.cache.shape
    assert not gradients["kv"].any()
    assert not gradients["attn_sink"].any()


@pytest.mark.parametrize("page", [1, 2, 53, 64])
def test_pages(backend: Target, page: int) -> None:
    blocks = max(2, 128 // page)
    inputs = make(5, h_q=4, topk=40, page=page, num_blocks=blocks, rows=False, device=backend.device)
    check_sparse_prefill_gradients(inputs)


@pytest.mark.parametrize("deterministic", [False, True])
def test_rows_that_are_selected_again_and_again(backend: Target, deterministic: bool) -> None:
    s_q, h_q = (300, 128) if backend.on_gpu else (5, 4)
    inputs = make(s_q, h_q=h_q, topk=130, page=3, num_blocks=1, device=backend.device)
    check_sparse_prefill_gradients(inputs, deterministic=deterministic)


def test_many_queries_of_many_heads(backend: Target) -> None:
    """More work items than a GPU has SMs, and lists of several tiles."""
    s_q, h_q = (400, 128) if backend.on_gpu else (3, 70)
    inputs = make(s_q, h_q=h_q, topk=400, num_blocks=30, sink=True, device=backend.device)
    check_sparse_prefill_gradients(inputs)


def test_lse_of_base_2(backend: Target) -> None:
    inputs = make(9, h_q=4, topk=40, sink=True, device=backend.device)
    d_out, d_lse = random_sparse_prefill_gradients(inputs)
    wanted = sparse_prefill_gradients(inputs, d_out, d_lse)
    given = sparse_prefill_gradients(inputs, d_out, d_lse * math.log(2), return_lse_base="2")
    for name, gradient in given.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -1e30, 1e30, 0.0])
def test_extreme_sinks(backend: Target, sink: float) -> None:
    inputs = make(4, h_q=4, topk=70, device=backend.device)
    inputs.attn_sink = torch.full((4,), sink, device=backend.device)
    gradients = random_sparse_prefill_gradients(inputs)
    given = sparse_prefill_gradients(inputs, *gradients)
    check_sparse_prefill_gradients(inputs, result=given)
    if math.isinf(sink) or abs(sink) > 1:
        assert not given["attn_sink"].any()


# ---- What must not matter, and what must.


def test_no_valid_index(backend: Target) -> None:
    """No gradients, whatever stands in such a query's rows."""
    inputs = make(5, h_q=4, topk=70, invalid=1.1, sink=True, device=backend.device)
    gradients = random_sparse_prefill_gradients(inputs)
    assert all(bool(gradient.isnan().all()) for gradient in gradients)
    inputs.q.fill_(math.nan)
    for deterministic in (False, True):
        for gradient in sparse_prefill_gradients(inputs, *gradients, deterministic=deterministic).values():
            assert not gradient.any()


@pytest.mark.parametrize("deterministic", [False, True])
def test_nan_reaches_what_it_belongs_to_and_nothing_else(backend: Target, deterministic: bool) -> None:
    inputs = make(9, h_q=5, topk=20, page=40, invalid=0.0, lengths="none", device=backend.device)
    d_out, d_lse = random_sparse_prefill_gradients(inputs)
    d_out[4, 2, 7] = math.nan
    given = sparse_prefill_gradients(inputs, d_out, d_lse, deterministic=deterministic)
    d_q, d_kv = given["q"], given["kv"]
    assert bool(d_q[4, 2].isnan().all())
    d_q[4, 2] = 0
    assert not bool(d_q.isnan().any())
    hit = torch.zeros(len(d_kv), dtype=torch.bool, device=backend.device)
    hit[inputs.primary.indices[4, 0].long()] = True
    assert torch.equal(d_kv[:, 0].isnan().any(-1), hit)


def test_strided_tensors(backend: Target) -> None:
    inputs = make(7, h_q=4, topk=70, sink=True, device=backend.device)
    d_out, d_lse = random_sparse_prefill_gradients(inputs)
    wanted = sparse_prefill_gradients(inputs, d_out, d_lse, deterministic=True)

    def strided(tensor: Tensor) -> Tensor:
        rows, heads, width = tensor.shape
        room = torch.full((rows, heads + 1, width + 8), math.nan, dtype=tensor.dtype, device=backend.device)
        room[:, 1:, :width] = tensor
        return room[:, 1:, :width]

    inputs.q, d_out = strided(inputs.q), strided(d_out)
    inputs.primary = replace(inputs.primary, cache=strided(inputs.primary.cache))
    d_lse = d_lse.repeat_interleave(2, 1)[:, ::2]
    assert_same_bits(sparse_prefill_gradients(inputs, d_out, d_lse, deterministic=True), wanted)


def test_expanded_queries(backend: Target) -> None:
    inputs = make(6, h_q=4, topk=70, lengths="none", device=backend.device)
    inputs.q = inputs.q[:1].expand(6, -1, -1)
    given = random_sparse_prefill_gradients(inputs)
    wanted = sparse_prefill_gradients(replace(inputs, q=inputs.q.contiguous()), *given, deterministic=True)
    assert_same_bits(sparse_prefill_gradients(inputs, *given, deterministic=True), wanted)


def test_gradients_of_a_sum(backend: Target) -> None:
    """Gradients of out and lse that are expanded from one number."""
    inputs = make(5, h_q=4, topk=40, lengths="none", device=backend.device)
    leaf = inputs.q.requires_grad_()
    out, _, lse = flash_mla_sparse_fwd(**inputs.call())
    (given,) = torch.autograd.grad(out.sum(dtype=torch.float32) + lse.sum(), leaf)
    out, _, lse = flash_mla_sparse_fwd(**inputs.call())
    (wanted,) = torch.autograd.grad((out, lse), leaf, (torch.ones_like(out), torch.ones_like(lse)))
    torch.testing.assert_close(given, wanted, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_are_repeatable(backend: Target, deterministic: bool) -> None:
    s_q, h_q = (300, 128) if backend.on_gpu else (5, 4)
    inputs = make(s_q, h_q=h_q, topk=200, sink=True, device=backend.device)
    gradients = random_sparse_prefill_gradients(inputs)
    first = sparse_prefill_gradients(inputs, *gradients, deterministic=deterministic)
    for _ in range(3):
        again = sparse_prefill_gradients(inputs, *gradients, deterministic=deterministic)
        if deterministic or not backend.on_gpu:
            assert_same_bits(again, first)
        else:
            assert_same_bits({"q": again["q"]}, {"q": first["q"]})
            torch.testing.assert_close(again["kv"], first["kv"], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_a_graph_is_right_for_other_indices(cuda: Target, deterministic: bool) -> None:
    inputs = make(40, h_q=16, topk=300, sink=True, num_blocks=5, device="cuda")
    inputs.primary.cache.nan_to_num_(nan=1.0)
    gradients = random_sparse_prefill_gradients(inputs)
    gradients = tuple(gradient.nan_to_num(0.0) for gradient in gradients)
    sparse_prefill_gradients(inputs, *gradients)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = sparse_prefill_gradients(inputs, *gradients, deterministic=deterministic)
    for shift in (0, 3):
        inputs.primary.indices.copy_(inputs.primary.indices.roll(shift, 0))
        inputs.primary.lengths.copy_(inputs.primary.lengths.roll(shift, 0))
        for tensor in captured.values():
            tensor.fill_(math.nan)
        graph.replay()
        again = sparse_prefill_gradients(inputs, *gradients, deterministic=deterministic)
        for name, gradient in captured.items():
            torch.testing.assert_close(gradient, again[name], rtol=1e-2, atol=1e-2)


# ---- torch.


@pytest.mark.parametrize("deterministic", [False, True])
def test_opcheck(backend: Target, deterministic: bool) -> None:
    inputs = make(3, h_q=2, topk=9, page=4, sink=True, device=backend.device)
    inputs.primary.cache.nan_to_num_(nan=0.0)
    arguments = [
        each.nan_to_num(0.0) if isinstance(each, Tensor) and each.is_floating_point() else each
        for each in operator_arguments(inputs, True)
    ]
    arguments[-3] = deterministic
    for prefix in ("reference_",) if backend.name == "triton" else ("", "reference_"):
        operator = getattr(torch.ops.flash_mla, f"{prefix}{OP}").default
        # Sums in any order are not the same twice, which the check of schemas wants.
        checks = ("test_schema", "test_faketensor") if deterministic or not backend.is_cuda else ("test_faketensor",)
        torch.library.opcheck(operator, tuple(arguments), test_utils=checks)


def test_compiled_without_graph_breaks(backend: Target) -> None:
    inputs = make(3, h_q=2, topk=20, sink=True, invalid=0.0, lengths="none", device=backend.device)
    call = inputs.call()

    def step(q: Tensor) -> Tensor:
        out, _, _ = flash_mla_sparse_fwd(**{**call, "q": q})
        return out.float().square().sum()

    torch._dynamo.reset()
    with backends.use(None):
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if backend.is_cuda else "aot_eager")
        q = inputs.q.clone().requires_grad_()
        for one, other in zip(torch.autograd.grad(compiled(q), q), torch.autograd.grad(step(q), q), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


# ---- What kernels do not take, and errors.


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "another d_v": ({"d_v": 448}, "head_dim_v must be 512"),
    "a second cache": ({"extra_topk": 5}, "there must be no extra_k_cache"),
    "a cache of bytes": ({"kv_format": "V32"}, "k_cache must be bfloat16"),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.filterwarnings("ignore:flash_mla")
def test_the_reference_computes_the_others(backend: Target, case: str) -> None:
    options, reason = OTHERS[case]
    inputs = make(4, h_q=3, topk=20, sink=True, device=backend.device, **options)
    check_sparse_prefill_gradients(inputs)
    if backend.is_cuda:
        assert reason in str(flash_mla.why_not(OP, **inputs.call()))


def test_why_not_of_a_problem() -> None:
    wanted = SparsePrefillBackwardProblem("cuda", 90, KVFormat.BF16, None, 4096, 128, 576, 512, 2048, 0, 576**-0.5)
    if backends.cuda_missing is not None:
        pytest.skip(backends.cuda_missing)
    with backends.use("cuda"):
        assert flash_mla.why_not(OP, wanted) is None
        for change, reason in (
            ({"compute_capability": 80}, "runs on compute capability 9.0 only"),
            ({"d_v": 576}, "head_dim_v must be 512"),
            ({"kv_format": KVFormat.V32}, "k_cache must be bfloat16"),
            ({"extra_kv_format": KVFormat.BF16}, "there must be no extra_k_cache"),
            ({"sm_scale": -1.0}, "softmax_scale must not be negative"),
        ):
            assert reason in str(flash_mla.why_not(OP, replace(wanted, **change)))


WRONG: dict[str, tuple[int, Callable[[Tensor], object], type[Exception], str]] = {
    "d_out dtype": (0, lambda d: d.float(), TypeError, "d_out must have dtype BFloat16, got Float"),
    "d_out heads": (0, lambda d: d[:, :1], ValueError, r"d_out must have shape \[s_q, h_q, 512\], so size 4 in"),
    "d_out width": (0, lambda d: d[..., :64], UnsupportedError, "head_dim_v must be 512"),
    "d_lse dtype": (1, lambda d: d.double(), TypeError, "d_lse must have dtype Float, got Double"),
    "q dtype": (2, lambda q: q.half(), TypeError, "q must have dtype BFloat16, got Half"),
    "kv device": (3, lambda kv: kv.cpu(), ValueError, "kv must be on the device of q"),
    "indices": (4, lambda i: i.long(), TypeError, "indices must have dtype Int, got Long"),
    "out tokens": (-2, lambda out: out[1:], ValueError, r"out must have shape \[s_q, h_q, 512\], so size 5 in"),
    "lse heads": (-1, lambda lse: lse[:, :1], ValueError, r"lse must have shape \[s_q, h_q\], so size 4 in"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(cuda: Target, case: str) -> None:
    position, change, error, text = WRONG[case]
    arguments = operator_arguments(make(5, h_q=4, topk=20, device="cuda"))
    arguments[position] = change(arguments[position])
    with pytest.raises(Exception, match=text) as caught:
        torch.ops.flash_mla.sparse_prefill_backward(*arguments)
    assert isinstance(from_native(caught.value), error)
