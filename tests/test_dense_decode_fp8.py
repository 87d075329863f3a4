"""Dense decode over FP8 caches on every backend: formats, per-tensor scales, traps, errors."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import Target, append_kv_cache, dequantize_kv_cache
from test_dense_decode import assert_same_bits, guarded
from torch import Tensor

import flash_mla
from flash_mla import (
    FlashMLASchedMeta,
    KVFormat,
    flash_mla_with_kvcache,
    get_mla_metadata,
)
from flash_mla.testing import DenseDecodeInputs, DenseFP8Inputs, check_decode, make_dense_fp8_inputs, run_decode

OP = "dense_decode_fp8"
FORMATS = [KVFormat.V32, KVFormat.V32_NO_ROPE, KVFormat.MODEL1, KVFormat.V41, None]
NAMES = [known.value if known else "E4M3" for known in FORMATS]
formats = pytest.mark.parametrize("known", FORMATS, ids=NAMES)


def make_inputs(backend: Target, lengths: list[int], known: KVFormat | str | None, **options: Any) -> DenseFP8Inputs:
    """Inputs on the backend's device; skips the test where its kernels do not take them."""
    inputs = make_dense_fp8_inputs(lengths, known, device=backend.device, **options)
    backend.require_kernel("dense_decode", **inputs.call())
    return inputs


@formats
@pytest.mark.parametrize("h_q", [1, 16, 63, 128])
def test_heads(backend: Target, h_q: int, known: KVFormat | None) -> None:
    inputs = make_inputs(backend, [65, 0, 1, 200], known, h_q=h_q, sink=h_q % 2 == 0)
    check_decode(inputs)


@formats
@pytest.mark.parametrize("page", [1, 2, 53, 64, 256])
def test_pages(backend: Target, page: int, known: KVFormat | None) -> None:
    inputs = make_inputs(backend, [page, page + 1, 0, 150], known, s_q=2, h_q=4, page=page, causal=True)
    check_decode(inputs)


@formats
@pytest.mark.parametrize("causal", [False, True])
def test_queries(backend: Target, causal: bool, known: KVFormat | None) -> None:
    inputs = make_inputs(backend, [66, 1, 0, 7, 150], known, s_q=7, h_q=4, causal=causal)
    check_decode(inputs)


@formats
def test_fp8_queries(backend: Target, known: KVFormat | None) -> None:
    """e4m3 q times descale_q; out is bfloat16."""
    inputs = make_inputs(backend, [65, 0, 130], known, s_q=2, h_q=8, fp8_q=True)
    assert inputs.q.dtype == torch.float8_e4m3fn
    result = run_decode(inputs)
    assert result[0].dtype == torch.bfloat16
    check_decode(inputs, result=result)


@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize("h_q", [5, 22])
def test_one_scale_and_scores_that_grow(backend: Target, h_q: int, d_qk: int) -> None:
    """The reference maximum is one of scores that have the scales; scales are no powers of two."""
    options = {"s_q": 3, "h_q": h_q, "d_qk": d_qk, "page": 3, "causal": True, "sink": True, "spread": 20.0}
    inputs = make_inputs(backend, [0, 1, 700, 130], None, fp8_q=True, **options)
    assert inputs.descale_q is not None
    assert inputs.descale_k is not None
    inputs.q = (inputs.q.float() * inputs.descale_q / 0.3).to(inputs.q.dtype)
    inputs.descale_q.fill_(0.3)
    check_decode(inputs)


@pytest.mark.parametrize("d_qk", [576, 512])
@pytest.mark.parametrize(("h_q", "h_kv"), [(8, 1), (8, 2), (66, 1)])
def test_a_scale_for_the_whole_cache(backend: Target, h_q: int, h_kv: int, d_qk: int) -> None:
    inputs = make_inputs(backend, [65, 0, 130], None, h_q=h_q, h_kv=h_kv, d_qk=d_qk)
    result = run_decode(inputs)
    check_decode(inputs, result=result)
    values = inputs.k_cache.float() * inputs.descale_k
    plain = DenseDecodeInputs(inputs.q, values.to(torch.bfloat16), inputs.block_table, inputs.cache_seqlens)
    for one, other in zip(result, run_decode(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("known", FORMATS[:-1], ids=NAMES[:-1])
def test_the_same_bits_as_over_the_values(backend: Target, known: KVFormat) -> None:
    """The values of a format are exact in bfloat16."""
    inputs = make_inputs(backend, [65, 0, 130], known, s_q=2, h_q=8, causal=True)
    values = dequantize_kv_cache(inputs.k_cache, known)
    names = ("block_table", "cache_seqlens", "causal")
    plain = DenseDecodeInputs(inputs.q, values, **{name: getattr(inputs, name) for name in names})
    result = run_decode(inputs)
    check_decode(plain, result=result)
    if backend.name == "reference":  # kernels choose their tiles by the format
        assert_same_bits(result, run_decode(plain))


@formats
def test_nothing_unreachable_matters(backend: Target, known: KVFormat | None) -> None:
    inputs = make_inputs(backend, [65, 0, 130, 1], known, h_q=4)
    trapped = run_decode(inputs)
    assert not bool(trapped[0].isnan().any())
    if known is None:
        codes = inputs.k_cache.view(torch.uint8)
        codes.masked_fill_(inputs.k_cache.isnan(), 0)
    else:
        rows = dequantize_kv_cache(inputs.k_cache, known).flatten(0, 2)
        slots = (~rows[:, 0].isnan()).nonzero()[:, 0]
        inputs.k_cache.zero_()
        append_kv_cache(rows[slots], inputs.k_cache, slots, known)
    assert_same_bits(run_decode(inputs), trapped)


@formats
def test_batch_invariance(backend: Target, known: KVFormat | None) -> None:
    inputs = make_inputs(backend, [300, 64, 0, 777], known, s_q=2, h_q=8, causal=True)
    out, lse = run_decode(inputs, enable_batch_invariant=True)
    check_decode(inputs, result=(out, lse))
    for request in (0, 3):
        rows = slice(request, request + 1)
        alone = replace(
            inputs,
            q=inputs.q[rows],
            block_table=inputs.block_table[rows],
            cache_seqlens=inputs.cache_seqlens[rows].contiguous(),
        )
        assert_same_bits(run_decode(alone, enable_batch_invariant=True), (out[rows], lse[rows]))


def test_the_dtype_alone_tells(backend: Target) -> None:
    """Without the flag and without the name of the format."""
    inputs = make_inputs(backend, [65, 0], "V32", h_q=4)
    wanted = run_decode(inputs)
    call = {**inputs.call(), "is_fp8_kvcache": False, "kv_format": None}
    for dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
        call["k_cache"] = inputs.k_cache.view(dtype)
        assert_same_bits(flash_mla_with_kvcache(**call, tile_scheduler_metadata=FlashMLASchedMeta()), wanted)


def test_given_outputs(backend: Target) -> None:
    inputs = make_inputs(backend, [65, 0, 7], "MODEL1", s_q=2, h_q=9)
    out, out_bytes = guarded((3, 2, 9, 512), torch.bfloat16, backend.device)
    lse, _ = guarded((3, 9, 2), torch.float32, backend.device)
    result = run_decode(inputs, out=out, lse=lse)
    assert result[0] is out
    assert result[1] is lse
    assert bool((out_bytes[:4096] == 0xA5).all())
    assert bool((out_bytes[-4096:] == 0xA5).all())
    assert_same_bits(result, run_decode(inputs))


def test_the_metadata_object(backend: Target) -> None:
    inputs = make_inputs(backend, [65, 0, 300], "V32", s_q=2, h_q=4, causal=True)
    meta, _ = get_mla_metadata()
    run_decode(inputs, meta)
    assert meta.config == FlashMLASchedMeta.Config(3, 2, 4, 64, 1, True, True)
    check_decode(inputs, meta)
    plain = DenseDecodeInputs(
        inputs.q, dequantize_kv_cache(inputs.k_cache, "V32"), inputs.block_table, inputs.cache_seqlens, True
    )
    with pytest.raises(ValueError, match=r"config\.is_fp8_kvcache: wanted True \(as planned\), got False"):
        run_decode(plain, meta)


def test_opcheck(backend: Target) -> None:
    """Over bytes: opcheck itself cannot compare e4m3 tensors."""
    inputs = make_inputs(backend, [65, 0], "V32", s_q=2, h_q=4)
    plan = torch.ops.flash_mla.plan_dense_decode(inputs.cache_seqlens, 2, 4, 1)
    tensors = (inputs.q, inputs.k_cache, inputs.block_table, inputs.cache_seqlens, *plan)
    arguments = (*tensors, None, 512, 0.04, False, False, None, None, "V32")
    for prefix in ("triton_",) if backend.name == "triton" else ("", "reference_"):
        torch.library.opcheck(getattr(torch.ops.flash_mla, f"{prefix}dense_decode_fp8").default, arguments)


WRONG = {
    "no descale_k": (
        {"descale_k": lambda d: None},
        TypeError,
        "descale_k: wanted a float32 tensor of one number with a k",
    ),
    "descale_k dtype": (
        {"descale_k": lambda d: d.half()},
        TypeError,
        "descale_k: wanted torch.float32, got torch.float16",
    ),
    "descale_k shape": (
        {"descale_k": lambda d: torch.ones(2, device=d.device)},
        ValueError,
        r"descale_k: wanted a tensor of one number, got shape \[2\]",
    ),
    "descale_q": (
        {"descale_q": lambda d: torch.ones(1)},
        ValueError,
        "descale_q: wanted None without an FP8 q, got Tensor",
    ),
    "no descale_q": (
        {"q": lambda q: q.to(torch.float8_e4m3fn)},
        TypeError,
        "descale_q: wanted a float32 tensor of one number with an FP8 q, got None",
    ),
    "q fp16": (
        {"q": lambda q: q.half()},
        TypeError,
        "q: wanted torch.bfloat16 or torch.float8_e4m3fn, got torch.float16",
    ),
    "q heads": ({"q": lambda q: q[:, :, :3]}, ValueError, "q: wanted h_q that is a multiple of h_kv = 2, got h_q = 3"),
    "width": (
        {"k_cache": lambda k: k[..., :512]},
        ValueError,
        r"k_cache: wanted 656 \(V32\) bytes per token for d_qk = 576, got 512",
    ),
    "uint8": (
        {"k_cache": lambda k: k.view(torch.uint8)},
        ValueError,
        r"k_cache: wanted 656 \(V32\) bytes per token for d_qk = 576, got 576",
    ),
    "format": ({"kv_format": lambda f: "V32"}, ValueError, r"k_cache: wanted 656 bytes per token \(V32\), got 576"),
    "topk_length": ({"topk_length": lambda n: 1}, ValueError, r"topk_length: wanted None in a dense call"),
    "block_table": (
        {"block_table": lambda t: None},
        TypeError,
        r"block_table: wanted a tensor \[b, max_blocks\], got None",
    ),
    "out": (
        {"out": lambda o: torch.zeros((2, 1, 4, 512), dtype=torch.float16)},
        TypeError,
        "out: wanted torch.bfloat16, got torch.float16",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(backend: Target, case: str) -> None:
    changes, error, text = WRONG[case]
    inputs = make_dense_fp8_inputs([65, 0], None, h_q=4, h_kv=2 if case == "q heads" else 1, device=backend.device)
    call = {**inputs.call(), "tile_scheduler_metadata": FlashMLASchedMeta()}
    spoiled = {name: change(call.get(name)) for name, change in changes.items()}
    with pytest.raises(error, match=text):
        flash_mla_with_kvcache(**{**call, **spoiled})
    backend.require_kernel("dense_decode", **inputs.call())
    flash_mla_with_kvcache(**call)


def test_scales_of_a_format_stand_in_the_cache(backend: Target) -> None:
    inputs = make_inputs(backend, [65, 0], "V32", h_q=4)
    inputs.descale_k = torch.ones(1, device=backend.device)
    with pytest.raises(
        ValueError, match=r"descale_k: wanted None without a k_cache of torch.uint8 without scales, got"
    ):
        run_decode(inputs)
    fp4 = replace(inputs, descale_k=None, kv_format=KVFormat.V41_FP4)
    with pytest.raises(ValueError, match="kv_format: wanted a format of d_qk = 576, like q, got V41_FP4 of 512"):
        run_decode(fp4)


def test_lengths_beyond_the_table_are_an_error() -> None:
    inputs = make_dense_fp8_inputs([5], "V32", h_q=4)
    inputs.cache_seqlens.fill_(64 * inputs.block_table.shape[1] + 1)
    with flash_mla.backends.use("reference"), pytest.raises(ValueError, match="cache_seqlens: wanted lengths from 0"):
        run_decode(inputs)


def test_no_keys_at_all(backend: Target) -> None:
    inputs = make_inputs(backend, [0, 0], "MODEL1", s_q=2, h_q=4, sink=True)
    out, lse = run_decode(inputs)
    assert not out.any()
    assert bool((lse == math.inf).all())
    assert isinstance(out, Tensor)
