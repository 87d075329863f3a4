"""The operators under torch.compile, opcheck, fake tensors and CUDA graphs."""

import re
from collections.abc import Callable

import pytest
import torch
from conftest import Target
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import flash_mla
from flash_mla import _ops, backends, flash_mla_with_kvcache, get_mla_metadata, merge_attention_states
from flash_mla.testing import DenseDecodeInputs, check_dense_decode, make_dense_decode_inputs, run_dense_decode


def some_inputs(backend: Target, b: int = 3, **options: object) -> DenseDecodeInputs:
    lengths = [(97 * request + 65) % 300 for request in range(b)]
    return make_dense_decode_inputs(lengths, s_q=2, h_q=16, device=backend.device, causal=True, **options)


def compiler(backend: Target) -> str:
    """Inductor generates code for the GPU; on the CPU the graph is captured, functionalised and run as it is."""
    return "inductor" if backend.on_gpu else "aot_eager"


@pytest.fixture
def automatic(backend: Target) -> Target:
    """The backend's device with the choice left to the library; it would not choose Triton where others serve."""
    with backends.use("triton" if backend.name == "triton" else None):
        yield backend


def compiled(function: Callable[..., object], backend: Target, **options: object) -> Callable[..., object]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=compiler(backend), **options)


def step(q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Two layers that share one schedule."""
    meta, _ = get_mla_metadata()
    out, lse = flash_mla_with_kvcache(q, k_cache, block_table, cache_seqlens, 512, meta, causal=True)
    again, _ = flash_mla_with_kvcache(q + 0.5, k_cache, block_table, cache_seqlens, 512, meta, causal=True)
    return out * 2 + again, lse + 1


def tensors(inputs: DenseDecodeInputs) -> tuple[Tensor, ...]:
    return inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens


@pytest.mark.parametrize("choice", ["automatic", "override"])
def test_compiled_without_graph_breaks(backend: Target, choice: str) -> None:
    arguments = tensors(some_inputs(backend))
    forced = "triton" if backend.name == "triton" else "reference"
    with backends.use(None if choice == "automatic" else forced):
        actual = compiled(step, backend)(*arguments)
        wanted = step(*arguments)
    for one, other in zip(actual, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compiled_with_any_batch(automatic: Target) -> None:
    function = compiled(step, automatic, dynamic=True)
    for b in (2, 3, 7):
        arguments = tensors(some_inputs(automatic, b))
        for one, other in zip(function(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)


def test_compiled_with_a_schedule_from_outside(automatic: Target) -> None:
    """The object is planned inside the compiled function, and keeps the plan."""
    inputs = some_inputs(automatic)
    meta, _ = get_mla_metadata()

    def decode(q: Tensor, meta: object) -> tuple[Tensor, Tensor]:
        return flash_mla_with_kvcache(q, *tensors(inputs)[1:], 512, meta, causal=True)

    function = compiled(decode, automatic)
    result = function(inputs.q, meta)
    check_dense_decode(inputs, result=result)
    assert meta.have_initialized
    assert meta.config.b == 3
    assert meta.num_splits.shape == (4,)
    check_dense_decode(inputs, result=function(inputs.q, meta))


def test_compiled_into_given_outputs(automatic: Target) -> None:
    inputs = some_inputs(automatic)
    wanted = run_dense_decode(inputs)
    out, lse = torch.zeros_like(wanted[0]), torch.zeros_like(wanted[1])

    def decode(q: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        meta, _ = get_mla_metadata()
        result, _ = flash_mla_with_kvcache(q, *tensors(inputs)[1:], 512, meta, causal=True, out=out, lse=lse)
        return result + 1

    plus_one = compiled(decode, automatic)(inputs.q, out, lse)
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])
    torch.testing.assert_close(plus_one, wanted[0] + 1)


def test_compiled_batch_invariant_mode(automatic: Target) -> None:
    inputs = some_inputs(automatic)

    def decode(q: Tensor) -> tuple[Tensor, Tensor]:
        return flash_mla_with_kvcache(q, *tensors(inputs)[1:], 512, None, causal=True, enable_batch_invariant=True)

    check_dense_decode(inputs, result=compiled(decode, automatic)(inputs.q))


def test_compiled_merge(automatic: Target) -> None:
    out, lse = run_dense_decode(some_inputs(automatic))
    function = compiled(lambda outs, lses: merge_attention_states(outs, lses), automatic)
    actual, wanted = function([out, out], [lse, lse]), merge_attention_states([out, out], [lse, lse])
    assert torch.equal(actual[0], wanted[0])
    assert torch.equal(actual[1], wanted[1])


def test_wrong_arguments_are_named_while_compiling(automatic: Target) -> None:
    inputs = some_inputs(automatic)
    inputs.block_table = inputs.block_table[:2]
    with pytest.raises(Exception, match=r"block_table: wanted \[b, max_blocks\] with b = 3"):
        compiled(step, automatic)(*tensors(inputs))


# ---- opcheck.


def operator_arguments(inputs: DenseDecodeInputs) -> tuple[object, ...]:
    plan = flash_mla.get_mla_decoding_metadata(inputs.cache_seqlens, 32, 1, 16)
    return (*tensors(inputs), *plan, inputs.attn_sink, 512, 0.04, True, False)


def operators(backend: Target, name: str) -> list[torch._ops.OpOverload]:
    """The operator and the reference's twin of it, or Triton's twin."""
    prefixes = ("triton_",) if backend.name == "triton" else ("", "reference_")
    return [getattr(torch.ops.flash_mla, prefix + name).default for prefix in prefixes]


@pytest.mark.parametrize("sink", [False, True])
def test_opcheck_dense_decode(backend: Target, sink: bool) -> None:
    for op in operators(backend, "dense_decode"):
        torch.library.opcheck(op, operator_arguments(some_inputs(backend, sink=sink)))
        *inputs, _ = operator_arguments(some_inputs(backend))
        torch.library.opcheck(op, (*inputs[:4], None, None, *inputs[6:], True))


def test_opcheck_dense_decode_out(backend: Target) -> None:
    for op in operators(backend, "dense_decode_out"):
        out = torch.zeros((3, 2, 16, 512), dtype=torch.bfloat16, device=backend.device)
        lse = torch.zeros((3, 16, 2), device=backend.device)
        torch.library.opcheck(op, (*operator_arguments(some_inputs(backend)), out, lse))


def test_opcheck_plan(backend: Target) -> None:
    for op in operators(backend, "plan_dense_decode"):
        torch.library.opcheck(op, (some_inputs(backend).cache_seqlens, 2, 16, 1))


@pytest.mark.parametrize("dims", [3, 4])
def test_opcheck_merge(backend: Target, dims: int) -> None:
    out, lse = run_dense_decode(some_inputs(backend))
    if dims == 3:
        out, lse = out[:, 0].contiguous(), lse[:, :, 0].contiguous()
    for op in operators(backend, "merge_attention_states"):
        torch.library.opcheck(op, ([out, out], [lse, lse]))


def test_fake_tensors_have_the_shapes_of_real_ones(backend: Target) -> None:
    arguments = operator_arguments(some_inputs(backend))
    decode, plan = operators(backend, "dense_decode")[0], operators(backend, "plan_dense_decode")[0]
    real = [*decode(*arguments), *plan(arguments[3], 2, 16, 1)]
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(value) if isinstance(value, Tensor) else value for value in arguments]
        fake = [*decode(*fakes), *plan(fakes[3], 2, 16, 1)]
    for one, other in zip(fake, real, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        assert one.device == other.device
        assert one.stride() == other.stride()


def test_the_schemas_are_those_of_the_native_library() -> None:
    """Python defines them where the library is missing; where it is there, its own must read the same."""
    for name, schema in _ops.SCHEMAS.items():
        registered = str(getattr(torch.ops.flash_mla, name).default._schema)
        twin = str(getattr(torch.ops.flash_mla, f"reference_{name}").default._schema)
        assert registered == twin.replace("reference_", "", 1), name
        assert re.sub(r"\s+", " ", schema).startswith("("), name


# ---- CUDA graphs.


@pytest.mark.gpu
def test_layers_of_one_captured_step_share_a_plan(gpu: Target) -> None:
    inputs = some_inputs(gpu)
    wanted = step(*tensors(inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors(inputs))
    for tensor in captured:
        tensor.fill_(float("nan"))
    graph.replay()
    for one, other in zip(captured, wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.gpu
def test_a_call_does_not_synchronise(gpu: Target) -> None:
    inputs = some_inputs(gpu)
    run_dense_decode(inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = run_dense_decode(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_dense_decode(inputs, result=result)


@pytest.mark.gpu
def test_other_streams(gpu: Target) -> None:
    inputs = some_inputs(gpu)
    wanted = run_dense_decode(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run_dense_decode(inputs)
    stream.synchronize()
    assert torch.equal(result[0], wanted[0])
    assert torch.equal(result[1], wanted[1])
