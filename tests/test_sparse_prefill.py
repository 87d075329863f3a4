"""flash_mla_sparse_fwd on every backend: outputs, traps, formats, gradients, errors."""

import math
from dataclasses import replace

import pytest
import torch
from conftest import Target, dequantize_kv_cache, quantize_kv_cache
from test_dense_decode import bits, guarded
from test_sparse_decode import naive
from torch import Tensor

import flash_mla
from flash_mla import KVFormat, UnsupportedError, backends, flash_mla_sparse_fwd
from flash_mla.testing import (
    SparseDecodeInputs,
    SparsePrefillInputs,
    assert_close,
    check_sparse_prefill,
    expected_sparse_prefill,
    make_sparse_prefill_inputs,
)

OP = "sparse_prefill"
PRIMARY_FORMATS = [known for known in KVFormat if known is not KVFormat.V41_FP4]


def run(inputs: SparsePrefillInputs, **options: object) -> tuple[Tensor, Tensor, Tensor]:
    return flash_mla_sparse_fwd(**{**inputs.call(), **options})


def assert_same_bits(one: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> None:
    for name, a, b in zip(("out", "max_logits", "lse"), one, other, strict=True):
        assert a.shape == b.shape
        assert torch.equal(bits(a), bits(b)), name


# ---- The definition.


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("d_qk", [576, 512])
def test_the_truth_is_the_naive_loop(d_qk: int, sink: bool) -> None:
    inputs = make_sparse_prefill_inputs(
        5, h_q=3, topk=9, d_qk=d_qk, lengths="token", invalid=0.3, extra_topk=4, sink=sink, page=8, rows=False
    )
    answer = expected_sparse_prefill(inputs)
    out, lse = naive(SparseDecodeInputs(inputs.q[:, None], inputs.primary, inputs.extra, inputs.attn_sink))
    torch.testing.assert_close(answer.out, out[:, 0], rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(answer.lse, lse[..., 0], rtol=1e-11, atol=1e-11)


def test_max_logits_is_the_largest_score(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(6, h_q=3, topk=9, lengths="token", device=backend.device)
    _, max_logits, _ = run(inputs)
    kv, scale = inputs.primary.cache[:, 0].double(), inputs.sm_scale
    for query in range(6):
        count = int(inputs.primary.lengths[query])
        live = [i for i in inputs.primary.indices[query, 0, :count].tolist() if 0 <= i < len(kv)]
        for head in range(3):
            scores = [scale * float(kv[i] @ inputs.q[query, head].double()) for i in live]
            wanted = max(scores, default=-math.inf)
            assert float(max_logits[query, head]) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


# ---- Shapes and options.


@pytest.mark.parametrize("known", PRIMARY_FORMATS)
@pytest.mark.parametrize("h_q", [1, 3, 16, 64, 128])
def test_heads_and_formats(backend: Target, h_q: int, known: KVFormat) -> None:
    """FP8 caches come in pages, with a second cache beside."""
    inputs = make_sparse_prefill_inputs(
        4, h_q=h_q, topk=70, kv_format=known, lengths="token", sink=h_q % 2 == 0, extra_topk=9, device=backend.device
    )
    check_sparse_prefill(inputs)


@pytest.mark.parametrize("topk", [1, 2, 63, 64, 65, 513, 2048])
def test_topk(backend: Target, topk: int) -> None:
    check_sparse_prefill(make_sparse_prefill_inputs(3, h_q=4, topk=topk, device=backend.device))


@pytest.mark.parametrize("s_q", [0, 1, 63, 200])
def test_queries(backend: Target, s_q: int) -> None:
    inputs = make_sparse_prefill_inputs(max(s_q, 1), h_q=4, topk=20, lengths="token", device=backend.device)
    if s_q == 0:
        inputs.q, inputs.primary = (
            inputs.q[:0],
            replace(inputs.primary, indices=inputs.primary.indices[:0], lengths=None),
        )
    check_sparse_prefill(inputs)


@pytest.mark.parametrize("known", ["BF16", "MODEL1"])
@pytest.mark.parametrize("page", [1, 2, 53, 64, 256])
def test_pages(backend: Target, page: int, known: str) -> None:
    inputs = make_sparse_prefill_inputs(
        3, h_q=4, topk=40, kv_format=known, page=page, num_blocks=max(2, 128 // page), rows=False, device=backend.device
    )
    assert inputs.primary.cache.dim() == 4
    check_sparse_prefill(inputs)


def test_fp4_beside_v41(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(
        3, h_q=4, kv_format="V41", extra_topk=20, extra_format="V41_FP4", device=backend.device
    )
    check_sparse_prefill(inputs)


@pytest.mark.parametrize(("d_qk", "d_v"), [(576, 512), (576, 128), (576, 576), (512, 512), (512, 1), (512, 448)])
def test_d_v(backend: Target, d_qk: int, d_v: int) -> None:
    inputs = make_sparse_prefill_inputs(3, d_v=d_v, h_q=4, d_qk=d_qk, device=backend.device)
    backend.require_kernel("sparse_prefill", **inputs.call())
    out, max_logits, lse = run(inputs)
    assert out.shape == (3, 4, d_v)
    if d_v > 1:
        check_sparse_prefill(inputs, result=(out, max_logits, lse))
    else:
        # One number is no vector, and where its terms cancel, rounding is as large as it: the emulation fails the bound
        # on cosines too. They are taken over the heads.
        answer = expected_sparse_prefill(inputs)
        assert_close("out", out.mT, answer.out.mT, answer.emulated_out.mT)
        assert_close("max_logits", max_logits, answer.max_logits, answer.emulated_max_logits)
        assert_close("lse", lse, answer.lse, answer.emulated_lse)
    if backend.is_cuda:
        wide, *rows = run(inputs, d_v=512)
        assert_same_bits((out, max_logits, lse), (wide[..., :d_v], *rows))


def test_the_base_of_lse(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(5, h_q=4, lengths="token", sink=True, device=backend.device)
    out, max_logits, lse = run(inputs)
    out2, max_logits2, lse2 = run(inputs, return_lse_base="2")
    assert torch.equal(out, out2)
    assert torch.equal(max_logits, max_logits2)
    torch.testing.assert_close(lse2, lse / math.log(2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sink", [-math.inf, math.inf, -1e30, 1e30, 3e38, 0.0])
def test_extreme_sinks(backend: Target, sink: float) -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=4, lengths="token", device=backend.device)
    without = run(inputs)
    inputs.attn_sink = torch.full((4,), sink, device=backend.device)
    result = run(inputs)
    check_sparse_prefill(inputs, result=result)
    assert torch.equal(result[2], without[2])
    assert torch.equal(result[1], without[1])
    if sink < 0:
        assert torch.equal(result[0], without[0])
    if sink > 1:
        assert not result[0].any()


def test_no_valid_index(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(3, h_q=4, invalid=1.1, sink=True, device=backend.device)
    out, max_logits, lse = run(inputs)
    assert not out.any()
    assert bool((max_logits == -math.inf).all())
    assert bool((lse == math.inf).all())
    _, _, lse = run(inputs, return_lse_base="2")
    assert bool((lse == math.inf).all())


def test_nothing_unreachable_matters(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(5, h_q=4, lengths="token", invalid=0.3, device=backend.device)
    trapped = run(inputs)
    assert not any(bool(tensor.isnan().any()) for tensor in trapped)
    inputs.primary.cache.nan_to_num_(nan=3.0)
    lanes = torch.arange(inputs.primary.indices.shape[-1], device=backend.device)
    inputs.primary.indices.masked_fill_(lanes >= inputs.primary.lengths[:, None, None], 0)
    assert_same_bits(run(inputs), trapped)


# ---- Memory.


def test_rows_that_overlap(backend: Target) -> None:
    """LMDeploy: a row begins before the one ahead of it ends."""
    stride, rows = 64, 50
    buffer = torch.randn(stride * rows + 576, device=backend.device).to(torch.bfloat16)
    kv = buffer.as_strided((rows, 1, 576), (stride, stride, 1))
    inputs = make_sparse_prefill_inputs(4, h_q=4, topk=30, page=10, invalid=0.0, device=backend.device)
    inputs.primary = replace(inputs.primary, cache=kv)
    check_sparse_prefill(inputs)
    plain = run(inputs)
    inputs.primary = replace(inputs.primary, cache=kv.contiguous())
    assert_same_bits(run(inputs), plain)


def test_rows_at_any_address(backend: Target) -> None:
    """Rows and results whose addresses are multiples of 2 bytes only."""
    inputs = make_sparse_prefill_inputs(4, h_q=4, topk=30, lengths="token", device=backend.device)
    wanted = run(inputs)
    s_kv = inputs.primary.cache.shape[0]
    wide = torch.full((s_kv, 1, 577), math.nan, dtype=torch.bfloat16, device=backend.device)
    wide[..., 1:] = inputs.primary.cache
    inputs.primary = replace(inputs.primary, cache=wide[..., 1:])
    assert_same_bits(run(inputs), wanted)
    room = torch.full((4, 5, 513), math.nan, dtype=torch.bfloat16, device=backend.device)
    assert_same_bits(run(inputs, out=room[:, :4, 1:]), wanted)
    assert bool(room[:, 4].isnan().all())
    assert bool(room[:, :4, 0].isnan().all())


def test_many_tokens_of_many_heads(backend: Target) -> None:
    """More row tiles than a GPU has SMs, lists of several tiles, and lengths that differ."""
    s_q, h_q = (150, 128) if backend.on_gpu else (3, 70)
    inputs = make_sparse_prefill_inputs(
        s_q, h_q=h_q, topk=200, lengths="token", sink=True, extra_topk=70, device=backend.device
    )
    check_sparse_prefill(inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("d_qk", [576, 512])
def test_many_tokens_beside_others_and_in_replays(cuda: Target, d_qk: int) -> None:
    """Several for each multiprocessor: alone, beside other calls, in replays. Bits are those of small calls."""
    s_q = 40 if cuda.emulated else 9 * torch.cuda.get_device_properties(cuda.device).multi_processor_count
    inputs = make_sparse_prefill_inputs(
        s_q, h_q=40, d_qk=d_qk, topk=100, lengths="token", sink=True, device=cuda.device
    )
    lengths = inputs.primary.lengths
    assert lengths is not None
    lengths[::7] = 0
    lengths[::11] = 1
    parts = [run(inputs.rows(slice(first, first + 100))) for first in range(0, s_q, 100)]
    wanted = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    assert_same_bits(run(inputs), wanted)
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    results = []
    for _ in range(3):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run(inputs))
    torch.cuda.synchronize()
    for result in results:
        assert_same_bits(result, wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    for _ in range(3):
        for result in captured:
            result.zero_()
        graph.replay()
        assert_same_bits(captured, wanted)


@pytest.mark.parametrize(("known", "extra"), [("V32", None), ("MODEL1", "MODEL1"), ("V41", "V41_FP4")])
def test_rows_that_are_selected_often(backend: Target, known: str, extra: str | None) -> None:
    """More selections than rows, where a kernel may convert the caches as a whole."""
    s_q, h_q, topk = (150, 40, 200) if backend.on_gpu else (8, 34, 40)
    inputs = make_sparse_prefill_inputs(
        s_q,
        h_q=h_q,
        topk=topk,
        kv_format=known,
        lengths="token",
        sink=True,
        page=16,
        num_blocks=100 if backend.on_gpu else 4,
        extra_topk=60 if extra else 0,
        extra_format=extra,
        device=backend.device,
    )
    result = run(inputs)
    check_sparse_prefill(inputs, result=result)
    few = replace(inputs, q=inputs.q[:, :32], attn_sink=inputs.attn_sink[:32])
    for whole, part in zip(result, run(few), strict=True):
        torch.testing.assert_close(whole[:, :32], part, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("known", ["BF16", "V32"])
def test_captured_in_a_graph(backend: Target, known: str) -> None:
    if not backend.on_gpu:
        pytest.skip("graphs are captured on a GPU")
    inputs = make_sparse_prefill_inputs(40, h_q=16, topk=300, kv_format=known, lengths="token", device="cuda")
    run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    inputs.primary.lengths.copy_(inputs.primary.lengths.flip(0))
    inputs.q.copy_(inputs.q.flip(0))
    graph.replay()
    assert_same_bits(captured, run(inputs))


def test_strided_tensors(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=4, lengths="token", device=backend.device)
    wanted = run(inputs)
    room = torch.full((4, 6, 640), math.nan, dtype=torch.bfloat16, device=backend.device)
    room[:, 1:5, :576] = inputs.q
    s_kv = inputs.primary.cache.shape[0]
    wide = torch.full((s_kv, 2, 1, 600), math.nan, dtype=torch.bfloat16, device=backend.device)
    wide[:, 1, :, :576] = inputs.primary.cache
    inputs.q = room[:, 1:5, :576]
    inputs.primary = replace(inputs.primary, cache=wide[:, 1, :, :576])
    assert_same_bits(run(inputs), wanted)


def test_given_out(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=9, lengths="token", sink=True, device=backend.device)
    wanted = run(inputs)
    out, buffer = guarded((4, 9, 512), torch.bfloat16, backend.device)
    result = run(inputs, out=out)
    assert result[0] is out
    assert bool((buffer[:4096] == 0xA5).all())
    assert bool((buffer[-4096:] == 0xA5).all())
    assert_same_bits(result, wanted)
    room = torch.full((4, 10, 600), math.nan, dtype=torch.bfloat16, device=backend.device)
    assert_same_bits(run(inputs, out=room[:, :9, 8:520]), wanted)
    assert bool(room[:, 9].isnan().all())
    assert bool(room[:, :9, :8].isnan().all())


def test_repeated_calls_give_the_same_bits(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(70, h_q=16, topk=300, lengths="token", device=backend.device)
    wanted = run(inputs)
    assert_same_bits(run(inputs), wanted)


# ---- Gradients.


def naive_attention(
    q: Tensor, caches: list[Tensor], inputs: SparsePrefillInputs, sink: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse as plain float64 expressions that autograd follows, one query at a time."""
    outs, lses = [], []
    sides = [side for side in (inputs.primary, inputs.extra) if side is not None]
    for query in range(q.shape[0]):
        rows = []
        for side, cache in zip(sides, caches, strict=True):
            count = side.indices.shape[-1] if side.lengths is None else int(side.lengths[query])
            rows += [cache[i, 0] for i in side.indices[query, 0, :count].tolist() if 0 <= i < cache.shape[0]]
        if not rows:
            outs.append(torch.zeros(q.shape[1], inputs.d_v, dtype=torch.float64))
            lses.append(torch.full((q.shape[1],), math.inf, dtype=torch.float64))
            continue
        keys = torch.stack(rows)
        scores = inputs.sm_scale * q[query] @ keys.t()
        lse = scores.logsumexp(-1)
        total = lse if sink is None else torch.logaddexp(lse, sink)
        outs.append((scores - total[:, None]).exp() @ keys[:, : inputs.d_v])
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


@pytest.mark.parametrize("base", ["e", "2"])
@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("extra_topk", [0, 7])
def test_gradients(backend: Target, extra_topk: int, sink: bool, base: str) -> None:
    inputs = make_sparse_prefill_inputs(
        5,
        d_v=448,
        h_q=3,
        topk=12,
        page=4,
        lengths="token",
        invalid=0.3,
        extra_topk=extra_topk,
        extra_page=1,
        sink=sink,
        device=backend.device,
    )
    sides = [side for side in (inputs.primary, inputs.extra) if side is not None]
    leaves = [inputs.q, *(side.cache for side in sides)] + ([inputs.attn_sink] if sink else [])
    for leaf in leaves:
        leaf.requires_grad_()
    out, max_logits, lse = run(inputs, return_lse_base=base)
    assert not max_logits.requires_grad
    generator = torch.Generator().manual_seed(5)
    d_out = torch.randn(out.shape, generator=generator).to(backend.device)
    d_lse = torch.randn(lse.shape, generator=generator).to(backend.device)
    gradients = torch.autograd.grad((out, lse), leaves, (d_out.to(out.dtype), d_lse))

    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    extra = None if inputs.extra is None else inputs.extra.to("cpu")
    on_cpu = SparsePrefillInputs(inputs.q, inputs.primary.to("cpu"), inputs.sm_scale, inputs.d_v, extra, None)
    true_sink = exact[-1] if sink else None
    true_out, true_lse = naive_attention(exact[0], exact[1 : 1 + len(sides)], on_cpu, true_sink)
    finite = true_lse.isfinite()
    factor = 1 / math.log(2) if base == "2" else 1.0
    total = (true_out * d_out.to(out.dtype).cpu().double()).sum() + factor * (true_lse * d_lse.cpu())[finite].sum()
    wanted = torch.autograd.grad(total, exact)
    for leaf, gradient, true in zip(leaves, gradients, wanted, strict=True):
        assert gradient.dtype == leaf.dtype
        assert not bool(gradient.isnan().any())
        assert_gradient_close(gradient.cpu().double(), true)


def assert_gradient_close(gradient: Tensor, true: Tensor) -> None:
    """Within the rounding of bfloat16 to the size of the largest element; zeros exactly where the truth has them."""
    assert not gradient[true == 0].any()
    error = (gradient - true).abs().max()
    assert error <= 2**-8 * true.abs().max()


def test_gradients_over_fp8_rows(backend: Target) -> None:
    """q and the sink have gradients, a cache of bytes has none."""
    inputs = make_sparse_prefill_inputs(4, h_q=3, topk=9, kv_format="MODEL1", sink=True, device=backend.device)
    inputs.q.requires_grad_()
    inputs.attn_sink.requires_grad_()
    out, _, lse = run(inputs)
    d_q, d_sink = torch.autograd.grad(out.float().sum() + lse.sum(), (inputs.q, inputs.attn_sink))
    exact_q, exact_sink = (leaf.detach().cpu().double().requires_grad_() for leaf in (inputs.q, inputs.attn_sink))
    values = dequantize_kv_cache(inputs.primary.cache, "MODEL1").cpu().double().flatten(0, 1)
    on_cpu = replace(inputs, primary=inputs.primary.to("cpu"))
    true_out, true_lse = naive_attention(exact_q, [values], on_cpu, exact_sink)
    wanted = torch.autograd.grad(true_out.sum() + true_lse.sum(), (exact_q, exact_sink))
    assert_gradient_close(d_q.cpu().double(), wanted[0])
    assert_gradient_close(d_sink.cpu().double(), wanted[1])


def test_gradients_of_rows_that_overlap(backend: Target) -> None:
    buffer = torch.randn(64 * 20 + 512, device=backend.device).to(torch.bfloat16).requires_grad_()
    kv = buffer.as_strided((20, 1, 512), (64, 64, 1))
    inputs = make_sparse_prefill_inputs(3, h_q=2, topk=9, page=4, d_qk=512, invalid=0.0, device=backend.device)
    out, _, _ = flash_mla_sparse_fwd(inputs.q, kv, inputs.primary.indices, 0.04)
    (gradient,) = torch.autograd.grad(out.float().square().sum(), buffer)
    assert gradient.shape == buffer.shape
    assert bool(gradient.isfinite().all())
    assert bool(gradient.any())


def test_given_out_and_gradients_do_not_go_together(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(3, h_q=2, device=backend.device)
    inputs.q.requires_grad_()
    out = torch.empty((3, 2, 512), dtype=torch.bfloat16, device=backend.device)
    with pytest.raises(ValueError, match="out: wanted None where an input requires a gradient, got a tensor"):
        run(inputs, out=out)
    with torch.no_grad():
        assert run(inputs, out=out)[0] is out


@pytest.mark.parametrize("rows", [False, True])
def test_opcheck(backend: Target, rows: bool) -> None:
    inputs = make_sparse_prefill_inputs(3, h_q=2, topk=9, page=4, extra_topk=3, sink=True, rows=False, invalid=0.2)
    one, two = inputs.primary, inputs.extra
    caches = [cache.nan_to_num_(nan=0.0) for cache in (one.cache, two.cache)]
    if rows:
        caches = [cache.flatten(0, 1) for cache in caches]
    arguments = [inputs.q, caches[0], one.indices, None, caches[1], two.indices, None, inputs.attn_sink]
    moved = [
        value.to(backend.device).requires_grad_(value.is_floating_point()) if value is not None else None
        for value in arguments
    ]
    for prefix in ("triton_",) if backend.name == "triton" else ("", "reference_"):
        operator = getattr(torch.ops.flash_mla, f"{prefix}sparse_prefill").default
        torch.library.opcheck(operator, (*moved, "BF16", "BF16", 512, 0.04, "e", False))


def test_compiled_without_graph_breaks(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(3, h_q=2, lengths="token", sink=True, device=backend.device)

    def step(q: Tensor) -> tuple[Tensor, Tensor]:
        out, _, lse = run(inputs, q=q)
        return out * 2, lse

    torch._dynamo.reset()
    with backends.use(None):
        compiled = torch.compile(step, fullgraph=True, backend="inductor" if backend.is_cuda else "aot_eager")
        for one, other in zip(compiled(inputs.q), step(inputs.q), strict=True):
            torch.testing.assert_close(one, other)


# ---- Callers and errors.


def test_tensorrt_llm_positional(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=16, topk=64, device=backend.device)
    result = flash_mla_sparse_fwd(inputs.q, inputs.primary.cache, inputs.primary.indices, inputs.sm_scale)
    check_sparse_prefill(inputs, result=result)
    sink = torch.randn(16, device=backend.device)
    lengths = torch.tensor([64, 3, 0, 9], dtype=torch.int32, device=backend.device)
    inputs.attn_sink, inputs.primary.lengths = sink, lengths
    tensors = (inputs.q, inputs.primary.cache, inputs.primary.indices)
    check_sparse_prefill(inputs, result=flash_mla_sparse_fwd(*tensors, inputs.sm_scale, 512, sink, lengths))


WRONG = {
    "q dtype": ({"q": lambda q: q.half()}, TypeError, "q: wanted torch.bfloat16, got torch.float16"),
    "q dims": ({"q": lambda q: q[None]}, ValueError, r"q: wanted 3 dimensions \[s_q, h_q, d_qk\], got"),
    "q None": ({"q": lambda q: None}, TypeError, r"q: wanted a tensor \[s_q, h_q, d_qk\], got None"),
    "q d_qk": ({"q": lambda q: q[..., :128]}, ValueError, r"q: wanted d_qk \(last dimension\) 576 or 512, got 128"),
    "kv None": ({"kv": lambda k: None}, TypeError, r"kv: wanted a tensor \[s_kv, h_kv = 1, d_qk\] or .*, got NoneType"),
    "kv dims": (
        {"kv": lambda k: k[:, 0]},
        ValueError,
        r"kv: wanted a tensor \[s_kv, h_kv = 1, d_qk\] or .*, got shape",
    ),
    "kv heads": ({"kv": lambda k: k.expand(-1, 2, -1)}, ValueError, r"kv: wanted one KV head \(h_kv = 1\), got 2"),
    "kv width": (
        {"kv": lambda k: k[..., :512]},
        ValueError,
        "kv: wanted a last dimension of d_qk = 576, like q, got 512",
    ),
    "kv dtype": ({"kv": lambda k: k.half()}, TypeError, "kv: wanted torch.bfloat16 or torch.float8_e4m3fn or .*, got"),
    "kv empty": ({"kv": lambda k: k[:0]}, ValueError, "kv: wanted num_blocks and page_block_size of at least 1"),
    "indices dtype": ({"indices": lambda i: i.long()}, TypeError, "indices: wanted torch.int32, got torch.int64"),
    "indices heads": (
        {"indices": lambda i: i.expand(-1, 2, -1)},
        ValueError,
        r"indices: wanted shape \[s_q, h_kv = 1, topk\] with \[4, 1\] first",
    ),
    "indices dims": ({"indices": lambda i: i[:, 0]}, ValueError, "indices: wanted 3 dimensions"),
    "scale": ({"sm_scale": lambda s: math.inf}, ValueError, "sm_scale: wanted a finite number, got inf"),
    "scale type": ({"sm_scale": lambda s: "x"}, TypeError, "sm_scale: wanted a finite number, got str"),
    "d_v": ({"d_v": lambda d: 577}, ValueError, "d_v: wanted at most d_qk = 576, got 577"),
    "d_v 0": ({"d_v": lambda d: 0}, ValueError, "d_v: wanted at least 1, got 0"),
    "base": ({"return_lse_base": lambda b: "10"}, ValueError, "return_lse_base: wanted 'e' or '2', got '10'"),
    "length": (
        {"topk_length": lambda n: torch.zeros((4, 1), dtype=torch.int32)},
        ValueError,
        r"topk_length: wanted 1 dimensions \[s_q\], got shape \[4, 1\]",
    ),
    "extra alone": (
        {"extra_indices_in_kvcache": lambda i: torch.zeros((4, 1, 3), dtype=torch.int32)},
        ValueError,
        "extra_indices_in_kvcache: wanted None without extra_k_cache, got Tensor",
    ),
    "format": (
        {"kv_format": lambda f: "V32"},
        TypeError,
        "kv: wanted torch.float8_e4m3fn or torch.int8 or torch.uint8, got torch.bfloat16",
    ),
    "sink": (
        {"attn_sink": lambda s: torch.zeros(3)},
        ValueError,
        r"attn_sink: wanted shape \[h_q\] = \[2\], got \[3\]",
    ),
    "out shape": (
        {"out": lambda o: torch.zeros((4, 2, 576), dtype=torch.bfloat16)},
        ValueError,
        r"out: wanted shape \[s_q, h_q, d_v\] = \[4, 2, 512\], got \[4, 2, 576\]",
    ),
    "out dtype": (
        {"out": lambda o: torch.zeros((4, 2, 512))},
        TypeError,
        "out: wanted torch.bfloat16, got torch.float32",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(backend: Target, case: str) -> None:
    changes, error, text = WRONG[case]
    call = make_sparse_prefill_inputs(4, h_q=2, device=backend.device).call()
    call["kv_format"] = None
    spoiled = {name: change(call.get(name)) for name, change in changes.items()}
    moved = {name: value.to(backend.device) if isinstance(value, Tensor) else value for name, value in spoiled.items()}
    with pytest.raises(error, match=text):
        flash_mla_sparse_fwd(**{**call, **moved})
    flash_mla_sparse_fwd(**call)


def test_bytes_per_token_are_checked(backend: Target) -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=2, kv_format="MODEL1", device=backend.device)
    rows = torch.zeros((5, 576), dtype=torch.bfloat16, device=backend.device)
    call = {**inputs.call(), "kv_format": None, "kv": quantize_kv_cache(rows, "V32", 64)}
    with pytest.raises(ValueError, match=r"kv: wanted 584 \(MODEL1\) or .* bytes per token for d_qk = 512, got 656"):
        flash_mla_sparse_fwd(**call)


def test_the_cuda_backend_says_why_not() -> None:
    inputs = make_sparse_prefill_inputs(4, h_q=2)
    with backends.use("cuda"), pytest.raises(UnsupportedError, match="sparse prefill: no backend takes the problem"):
        run(inputs)
    reason = flash_mla.why_not("sparse_prefill", **inputs.call())
    assert reason is not None
    assert reason.startswith("cuda: the tensors are on cpu; triton: ")
