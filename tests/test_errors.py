"""Every wrong argument gives an error that names it, says what was wanted and what came: the same on every backend."""

import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Target

import flash_mla
from flash_mla import (
    FlashMLASchedMeta,
    KVFormat,
    UnsupportedError,
    _ops,
    backends,
    dequantize_kv_cache,
    errors,
    flash_mla_with_kvcache,
    get_mla_decoding_metadata,
    quantize_kv_cache,
)
from flash_mla.backends import reference
from flash_mla.testing import (
    check_decode,
    check_dense_decode,
    check_dense_prefill,
    check_sparse_prefill,
    make_dense_decode_inputs,
    make_dense_fp8_inputs,
    make_dense_prefill_inputs,
    make_sparse_decode_inputs,
    make_sparse_prefill_inputs,
)

Call = dict[str, object]
HALF = torch.bfloat16


def good_call(backend: Target) -> Call:
    inputs = make_dense_decode_inputs([70, 3], s_q=2, h_q=16, h_kv=2, device=backend.device)
    return {**inputs.call(), "tile_scheduler_metadata": FlashMLASchedMeta()}


def changed(name: str, change: Callable[..., object]) -> Callable[[Call], Call]:
    return lambda call: {**call, name: change(call[name])}


def given(**values: object) -> Callable[[Call], Call]:
    return lambda call: {**call, **values}


def built(name: str, make: Callable[[Call], object]) -> Callable[[Call], Call]:
    return lambda call: {**call, name: make(call)}


def like_q(*shape: int, dtype: torch.dtype = HALF) -> Callable[[Call], object]:
    return lambda call: torch.zeros(shape, dtype=dtype, device=call["q"].device)


def plan(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    return get_mla_decoding_metadata(call["cache_seqlens"], 16, 2, 16)


def with_plan(
    rows: Callable[..., object] = lambda x: x, splits: Callable[..., object] = lambda x: x
) -> Callable[[Call], Call]:
    def spoil(call: Call) -> Call:
        first, second = plan(call)
        return {**call, "tile_scheduler_metadata": rows(first), "num_splits": splits(second)}

    return spoil


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.repeat_interleave(2, -1)[..., ::2]


WRONG: dict[str, tuple[Callable[[Call], Call], type[Exception], str]] = {
    # q
    "q None": (given(q=None), TypeError, r"q: wanted a tensor \[b, s_q, h_q, d_qk\], got None"),
    "q list": (given(q=[1.0]), TypeError, r"q: wanted a tensor .*, got list"),
    "q 3d": (changed("q", lambda q: q[:, 0]), ValueError, r"q: wanted 4 dimensions .*, got shape \[2, 16, 576\]"),
    "q float32": (
        changed("q", torch.Tensor.float),
        TypeError,
        "q: wanted torch.bfloat16 or torch.float16, got torch.float32",
    ),
    "q d_qk": (
        lambda call: {
            **call,
            "q": call["q"][..., :128].contiguous(),
            "k_cache": call["k_cache"][..., :128].contiguous(),
        },
        ValueError,
        r"q: wanted d_qk \(last dimension\) 576 or 512, got 128",
    ),
    "q stride": (
        changed("q", every_other),
        ValueError,
        r"q: wanted a contiguous last dimension \(stride 1\), got stride 2",
    ),
    "q heads": (
        changed("q", lambda q: q[:, :, :15].contiguous()),
        ValueError,
        "q: wanted h_q that is a multiple of h_kv = 2, got h_q = 15",
    ),
    "q no tokens": (changed("q", lambda q: q[:, :0]), ValueError, "q: wanted s_q and h_q of at least 1, got shape"),
    "q no heads": (changed("q", lambda q: q[:, :, :0]), ValueError, "q: wanted s_q and h_q of at least 1, got shape"),
    # k_cache
    "k_cache None": (given(k_cache=None), TypeError, "k_cache: wanted a tensor .*, got None"),
    "k_cache 3d": (changed("k_cache", lambda k: k[:, :, 0]), ValueError, "k_cache: wanted 4 dimensions .*, got shape"),
    "k_cache other dtype": (
        changed("k_cache", torch.Tensor.half),
        TypeError,
        "k_cache: wanted torch.bfloat16, like q, got torch.float16",
    ),
    "k_cache float32": (
        changed("k_cache", torch.Tensor.float),
        TypeError,
        "k_cache: wanted torch.bfloat16, like q, got",
    ),
    "k_cache width": (
        changed("k_cache", lambda k: k[..., :512].contiguous()),
        ValueError,
        "k_cache: wanted a last dimension of d_qk = 576, like q, got 512",
    ),
    "k_cache stride": (changed("k_cache", every_other), ValueError, "k_cache: wanted a contiguous last dimension"),
    "k_cache empty": (
        changed("k_cache", lambda k: k[:0]),
        ValueError,
        "k_cache: wanted num_blocks, page_block_size and h_kv",
    ),
    "k_cache no slots": (
        changed("k_cache", lambda k: k[:, :0]),
        ValueError,
        "k_cache: wanted num_blocks, page_block_size",
    ),
    # block_table and cache_seqlens
    "block_table None": (
        given(block_table=None),
        TypeError,
        r"block_table: wanted a tensor \[b, max_blocks\], got None",
    ),
    "block_table 1d": (changed("block_table", lambda t: t[0]), ValueError, "block_table: wanted 2 dimensions"),
    "block_table int64": (
        changed("block_table", torch.Tensor.long),
        TypeError,
        "block_table: wanted torch.int32, got torch.int64",
    ),
    "block_table b": (
        changed("block_table", lambda t: t[:1]),
        ValueError,
        r"block_table: wanted \[b, max_blocks\] with b = 2, got shape \[1, ",
    ),
    "block_table stride": (changed("block_table", every_other), ValueError, "block_table: wanted a contiguous last"),
    "cache_seqlens None": (given(cache_seqlens=None), TypeError, r"cache_seqlens: wanted a tensor \[b\], got None"),
    "cache_seqlens int64": (
        changed("cache_seqlens", torch.Tensor.long),
        TypeError,
        "cache_seqlens: wanted torch.int32, got",
    ),
    "cache_seqlens 2d": (changed("cache_seqlens", lambda t: t[None]), ValueError, "cache_seqlens: wanted 1 dimensions"),
    "cache_seqlens b": (
        changed("cache_seqlens", lambda t: t[:1]),
        ValueError,
        r"cache_seqlens: wanted shape \[b\] = \[2\], got \[1\]",
    ),
    "cache_seqlens stride": (
        changed("cache_seqlens", every_other),
        ValueError,
        "cache_seqlens: wanted a contiguous tensor",
    ),
    # Numbers and flags
    "head_dim_v 256": (given(head_dim_v=256), ValueError, "head_dim_v: wanted 512, got 256"),
    "head_dim_v None": (given(head_dim_v=None), TypeError, "head_dim_v: wanted an int, got NoneType"),
    "softmax_scale NaN": (given(softmax_scale=math.nan), ValueError, "softmax_scale: wanted a finite number, got nan"),
    "softmax_scale inf": (given(softmax_scale=math.inf), ValueError, "softmax_scale: wanted a finite number, got inf"),
    "softmax_scale text": (given(softmax_scale="1"), TypeError, "softmax_scale: wanted a finite number, got str"),
    "causal text": (given(causal="yes"), TypeError, "causal: wanted a bool, got str"),
    "invariant text": (
        given(enable_batch_invariant="yes"),
        TypeError,
        "enable_batch_invariant: wanted a bool, got str",
    ),
    # attn_sink
    "attn_sink dtype": (
        built("attn_sink", like_q(16)),
        TypeError,
        "attn_sink: wanted torch.float32, got torch.bfloat16",
    ),
    "attn_sink shape": (
        built("attn_sink", like_q(8, dtype=torch.float32)),
        ValueError,
        r"attn_sink: wanted shape \[h_q\] = \[16\], got \[8\]",
    ),
    "attn_sink 2d": (
        built("attn_sink", like_q(16, 1, dtype=torch.float32)),
        ValueError,
        "attn_sink: wanted 1 dimensions",
    ),
    # The schedule
    "metadata None": (
        given(tile_scheduler_metadata=None),
        TypeError,
        r"tile_scheduler_metadata: wanted a tensor \[num_sm_parts, 8\] or a FlashMLASchedMeta, got None",
    ),
    "metadata other": (
        given(tile_scheduler_metadata=7),
        TypeError,
        "tile_scheduler_metadata: wanted a tensor .*, got int",
    ),
    "metadata dtype": (
        with_plan(rows=torch.Tensor.long),
        TypeError,
        "tile_scheduler_metadata: wanted torch.int32, got",
    ),
    "metadata fields": (
        with_plan(rows=lambda t: t[:, :7].contiguous()),
        ValueError,
        r"tile_scheduler_metadata: wanted shape \[num_sm_parts, 8\] with 1 to 65535 rows, got \[\d+, 7\]",
    ),
    "metadata rows": (with_plan(rows=lambda t: t[:0]), ValueError, "tile_scheduler_metadata: wanted shape .*, got"),
    "metadata stride": (
        with_plan(rows=lambda t: t.t().contiguous().t()),
        ValueError,
        "tile_scheduler_metadata: wanted a contig",
    ),
    "num_splits None": (
        with_plan(splits=lambda t: None),
        TypeError,
        r"num_splits: wanted a tensor \[b \+ 1\], got None",
    ),
    "num_splits dtype": (
        with_plan(splits=torch.Tensor.long),
        TypeError,
        "num_splits: wanted torch.int32, got torch.int64",
    ),
    "num_splits shape": (
        with_plan(splits=lambda t: t[:2]),
        ValueError,
        r"num_splits: wanted shape \[b \+ 1\] = \[3\], got \[2\]",
    ),
    "num_splits stride": (with_plan(splits=every_other), ValueError, "num_splits: wanted a contiguous tensor"),
    # Outputs
    "out dtype": (
        built("out", like_q(2, 2, 16, 512, dtype=torch.float16)),
        TypeError,
        "out: wanted torch.bfloat16, got torch.float16",
    ),
    "out shape": (
        built("out", like_q(2, 2, 16, 576)),
        ValueError,
        r"out: wanted shape \[b, s_q, h_q, head_dim_v\] = \[2, 2, 16, 512\], got \[2, 2, 16, 576\]",
    ),
    "out 3d": (built("out", like_q(2, 16, 512)), ValueError, "out: wanted 4 dimensions"),
    "out stride": (
        built("out", lambda call: every_other(like_q(2, 2, 16, 512)(call))),
        ValueError,
        "out: wanted a contiguous last dimension",
    ),
    "out other": (given(out="here"), TypeError, "out: wanted a tensor .*, got str"),
    "lse dtype": (built("lse", like_q(2, 16, 2)), TypeError, "lse: wanted torch.float32, got torch.bfloat16"),
    "lse shape": (
        built("lse", like_q(2, 2, 16, dtype=torch.float32)),
        ValueError,
        r"lse: wanted shape \[b, h_q, s_q\] = \[2, 16, 2\], got \[2, 2, 16\]",
    ),
    # Arguments of other kinds of calls
    "fp8 flag": (
        given(is_fp8_kvcache=True),
        ValueError,
        "is_fp8_kvcache: wanted False, since k_cache is torch.bfloat16",
    ),
    "fp8 flag text": (given(is_fp8_kvcache="yes"), TypeError, "is_fp8_kvcache: wanted a bool, got str"),
    "kv_format": (
        given(kv_format="V32"),
        ValueError,
        "kv_format: wanted None with a k_cache of torch.bfloat16, got str",
    ),
    "descale_q": (built("descale_q", like_q(1)), ValueError, "descale_q: wanted None with a k_cache of torch.bfloat16"),
    "descale_k": (built("descale_k", like_q(1)), ValueError, "descale_k: wanted None with a k_cache of torch.bfloat16"),
    "topk_length": (
        built("topk_length", like_q(2)),
        ValueError,
        r"topk_length: wanted None in a dense call \(indices is None\)",
    ),
    "extra_k_cache": (built("extra_k_cache", like_q(2)), ValueError, "extra_k_cache: wanted None in a dense call"),
    "extra_indices": (
        built("extra_indices_in_kvcache", like_q(2)),
        ValueError,
        "extra_indices_in_kvcache: wanted None in a dense call",
    ),
    "extra_topk": (built("extra_topk_length", like_q(2)), ValueError, "extra_topk_length: wanted None in a dense call"),
    # Sparse calls
    "sparse causal": (
        lambda call: {**call, "indices": like_q(2, 2, 64, dtype=torch.int32)(call), "causal": True},
        ValueError,
        r"causal: wanted False with indices",
    ),
    "sparse extra indices": (
        lambda call: {
            **call,
            "indices": like_q(2, 2, 64, dtype=torch.int32)(call),
            "extra_indices_in_kvcache": like_q(2, 2, 64, dtype=torch.int32)(call),
        },
        ValueError,
        "extra_indices_in_kvcache: wanted None without extra_k_cache",
    ),
    "sparse extra length": (
        lambda call: {
            **call,
            "indices": like_q(2, 2, 64, dtype=torch.int32)(call),
            "extra_topk_length": like_q(2, dtype=torch.int32)(call),
        },
        ValueError,
        "extra_topk_length: wanted None without extra_k_cache",
    ),
    "sparse extra cache": (
        lambda call: {**call, "indices": like_q(2, 2, 64, dtype=torch.int32)(call), "extra_k_cache": call["k_cache"]},
        ValueError,
        r"extra_indices_in_kvcache: wanted int32 \[b, s_q, extra_topk\] with extra_k_cache, got None",
    ),
    # FP8
    "sparse heads": (
        built("indices", like_q(2, 2, 64, dtype=torch.int32)),
        ValueError,
        r"k_cache: wanted one KV head \(h_kv = 1\), got 2",
    ),
    "fp8 cache": (
        lambda call: {**call, "k_cache": call["k_cache"].to(torch.float8_e4m3fn), "is_fp8_kvcache": True},
        TypeError,
        "descale_k: wanted a float32 tensor of one number with a k_cache of torch.float8_e4m3fn .*, got None",
    ),
    "uint8 cache": (
        lambda call: {**call, "k_cache": call["k_cache"].to(torch.uint8)},
        ValueError,
        r"k_cache: wanted 656 \(V32\) bytes per token for d_qk = 576, got 576",
    ),
    "fp8 q": (
        changed("q", lambda q: q.to(torch.float8_e4m3fn)),
        TypeError,
        "q: wanted torch.bfloat16 or torch.float16, got torch.float8_e4m3fn",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_calls(backend: Target, case: str) -> None:
    spoil, error, text = WRONG[case]
    call = good_call(backend)
    with pytest.raises(error, match=text) as caught:
        flash_mla_with_kvcache(**spoil(call))
    assert "flash_mla[" not in str(caught.value)
    flash_mla_with_kvcache(**call)


def test_the_good_call_is_good(backend: Target) -> None:
    out, lse = flash_mla_with_kvcache(**good_call(backend))
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


DEVICE_ARGUMENTS = [
    "k_cache",
    "block_table",
    "cache_seqlens",
    "attn_sink",
    "out",
    "lse",
    "tile_scheduler_metadata",
    "num_splits",
]


@pytest.mark.gpu
@pytest.mark.parametrize("name", DEVICE_ARGUMENTS)
def test_tensors_on_two_devices(cuda: Target, name: str) -> None:
    call = good_call(cuda)
    call["tile_scheduler_metadata"], call["num_splits"] = plan(call)
    call["attn_sink"] = torch.zeros(16, device="cuda")
    call["out"] = torch.empty((2, 2, 16, 512), dtype=HALF, device="cuda")
    call["lse"] = torch.empty((2, 16, 2), device="cuda")
    flash_mla_with_kvcache(**call)
    with pytest.raises(ValueError, match=f"{name}: wanted a tensor on cuda:0, like q, got cpu"):
        flash_mla_with_kvcache(**{**call, name: call[name].cpu()})


@pytest.mark.gpu
def test_q_alone_on_the_cpu(cuda: Target) -> None:
    call = good_call(cuda)
    with backends.use(None), pytest.raises(ValueError, match="k_cache: wanted a tensor on cpu, like q, got cuda:0"):
        flash_mla_with_kvcache(**{**call, "q": call["q"].cpu()})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k_cache"])
def test_unaligned_strides_are_not_supported(cuda: Target, name: str) -> None:
    call = good_call(cuda)
    tensor = call[name]
    room = torch.zeros((*tensor.shape[:-1], 577), dtype=HALF, device="cuda")
    with pytest.raises(
        UnsupportedError, match=f"{name} must have an address and strides that are multiples of 16 bytes"
    ):
        flash_mla_with_kvcache(**{**call, name: room[..., :576]})


WRONG_AFTER_A_GOOD_SPARSE_CALL: dict[str, tuple[Callable[[Call], Call], type[Exception], str]] = {
    "causal 0": (given(causal=0), TypeError, "causal: wanted a bool, got int"),
    "causal": (given(causal=True), ValueError, "causal: wanted False with indices"),
    "fp8 flag 1": (given(is_fp8_kvcache=1), TypeError, "is_fp8_kvcache: wanted a bool, got int"),
    "descale_k": (built("descale_k", like_q(1)), ValueError, "descale_k: wanted None with indices"),
    "extra length": (built("extra_topk_length", like_q(2)), ValueError, "extra_topk_length: wanted None without extra"),
    "extra cache": (
        lambda call: {**call, "extra_k_cache": call["k_cache"]},
        ValueError,
        "extra_indices_in_kvcache: wanted int32",
    ),
    "format list": (given(kv_format=["V32"]), TypeError, "kv_format: wanted a KVFormat or its name, got list"),
    "other format": (given(kv_format="V41"), ValueError, "kv_format: wanted a format of d_qk = 576, like q, got V41"),
    "q 3d": (changed("q", lambda q: q[0]), ValueError, r"q: wanted 4 dimensions \[b, s_q, h_q, d_qk\], got shape"),
    "q None": (given(q=None), TypeError, r"q: wanted a tensor \[b, s_q, h_q, d_qk\], got None"),
    "k_cache 3d": (changed("k_cache", lambda k: k[0]), ValueError, "k_cache: wanted 4 dimensions .*, got shape"),
    "k_cache dtype": (changed("k_cache", lambda k: k.view(torch.bool)), TypeError, "k_cache: wanted torch.bfloat16 or"),
    "k_cache width": (changed("k_cache", lambda k: k[..., :640]), ValueError, r"k_cache: wanted 656 \(V32\) bytes"),
}


@pytest.mark.parametrize("case", WRONG_AFTER_A_GOOD_SPARSE_CALL)
def test_a_good_sparse_call_hides_no_wrong_one(backend: Target, case: str) -> None:
    """What is remembered of the formats of one call must not answer for another."""
    spoil, error, text = WRONG_AFTER_A_GOOD_SPARSE_CALL[case]
    inputs = make_sparse_decode_inputs(2, h_q=16, device=backend.device)
    call = {**inputs.call(), "kv_format": None, "tile_scheduler_metadata": FlashMLASchedMeta()}
    flash_mla_with_kvcache(**call)
    with pytest.raises(error, match=text):
        flash_mla_with_kvcache(**spoil(call))
    flash_mla_with_kvcache(**call)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"q": lambda q: q[None]}, ValueError, r"q: wanted 3 dimensions \[s_q, h_q, d_qk\], got shape"),
        ({"q": lambda q: None}, TypeError, r"q: wanted a tensor \[s_q, h_q, d_qk\], got None"),
        ({"kv": lambda kv: kv[:, 0]}, ValueError, r"kv: wanted a tensor \[s_kv, h_kv = 1, d_qk\] or .*, got shape"),
        ({"kv": lambda kv: kv.float()}, TypeError, "kv: wanted torch.bfloat16 or"),
        ({"kv": lambda kv: kv.repeat(1, 2, 1)}, ValueError, r"kv: wanted one KV head \(h_kv = 1\), got 2"),
    ],
)
def test_a_good_prefill_hides_no_wrong_one(
    backend: Target, change: dict[str, Callable[[torch.Tensor], object]], error: type[Exception], text: str
) -> None:
    inputs = make_sparse_prefill_inputs(2, h_q=2, device=backend.device)
    call = {**inputs.call(), "kv_format": None}
    assert call["kv"].dim() == 3
    good = flash_mla.flash_mla_sparse_fwd(**call)
    ((name, spoil),) = change.items()
    for out in (None, good[0]):
        with pytest.raises(error, match=text):
            flash_mla.flash_mla_sparse_fwd(**{**call, name: spoil(call[name]), "out": out})


def test_wrong_arguments_of_the_operator_itself(backend: Target) -> None:
    """The operators check before they touch memory, whoever calls them."""
    inputs = make_dense_decode_inputs([70, 3], h_q=16, device=backend.device)
    rows, num_splits = get_mla_decoding_metadata(inputs.cache_seqlens, 16, 1)
    arguments = [
        inputs.q,
        inputs.k_cache,
        inputs.block_table,
        inputs.cache_seqlens,
        rows,
        num_splits,
        None,
        512,
        0.04,
        False,
    ]
    torch.ops.flash_mla.dense_decode(*arguments, False)
    for position, wrong in ((0, inputs.q[0]), (2, inputs.block_table[:1]), (4, None), (5, num_splits[:1]), (7, 256)):
        spoiled = [*arguments[:position], wrong, *arguments[position + 1 :], False]
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            torch.ops.flash_mla.dense_decode(*spoiled)


# ---- Names.


def test_public_names() -> None:
    from flash_mla import flash_mla_interface

    for name in flash_mla.__all__:
        assert hasattr(flash_mla, name)
    for name in flash_mla_interface.__all__:
        assert getattr(flash_mla, name) is getattr(flash_mla_interface, name)
    assert flash_mla.KVFormat.V4 is flash_mla.KVFormat.MODEL1
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", flash_mla.__version__)


# ---- Backends and capability.


def test_unsupported_is_a_not_implemented_error() -> None:
    assert issubclass(UnsupportedError, NotImplementedError)
    assert isinstance(pickle.loads(pickle.dumps(UnsupportedError("x"))), UnsupportedError)


def test_the_cuda_backend_alone_refuses_cpu_tensors() -> None:
    inputs = make_dense_decode_inputs([70])
    with backends.use("cuda"):
        with pytest.raises(UnsupportedError, match="no backend takes the problem; cuda: the tensors are on cpu"):
            flash_mla_with_kvcache(**inputs.call(), tile_scheduler_metadata=FlashMLASchedMeta())
        with pytest.raises(UnsupportedError, match="cuda: the tensors are on cpu"):
            flash_mla.merge_attention_states([torch.zeros(1, 1, 512)], [torch.zeros(1, 1)])
        with pytest.raises(ValueError, match="head_dim_v: wanted 512, got 1"):
            flash_mla_with_kvcache(**{**inputs.call(), "head_dim_v": 1}, tile_scheduler_metadata=FlashMLASchedMeta())
    check_dense_decode(inputs)


def test_backends_nest_and_are_put_back() -> None:
    assert backends.override is None
    with backends.use("reference"):
        with backends.use("cuda"):
            assert backends.override is backends.CUDA
        with backends.use(None):
            assert backends.override is None
        assert backends.override is backends.REFERENCE
        with pytest.raises(TypeError), backends.use("cuda"):
            len(5)
        assert backends.override is backends.REFERENCE
    assert backends.override is None


def test_an_unknown_backend_is_named() -> None:
    with pytest.raises(ValueError, match="backend: wanted cuda or triton or reference, got fast"):
        backends.set_backend("fast")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(flash_mla.__file__).parent.parent
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_environment_chooses_a_backend() -> None:
    code = "from flash_mla import backends; print(backends.override.name)"
    assert run_python(code, FLASH_MLA_BACKEND="reference").stdout.strip() == "reference"
    wrong = run_python(code, FLASH_MLA_BACKEND="fast")
    assert wrong.returncode != 0
    assert "FLASH_MLA_BACKEND: wanted cuda or triton or reference, got fast" in wrong.stderr


def test_a_named_library_must_exist() -> None:
    result = run_python("import flash_mla", FLASH_MLA_LIBRARY="/nowhere/libflash_mla.so")
    assert result.returncode != 0
    assert "FLASH_MLA_LIBRARY: wanted a shared library, got /nowhere/libflash_mla.so" in result.stderr


def test_a_library_that_does_not_load_leaves_the_reference(tmp_path: Path) -> None:
    broken = tmp_path / "libflash_mla.so"
    broken.write_bytes(b"not a library")
    code = (
        "import flash_mla\n"
        "from flash_mla.testing import *\n"
        "check_dense_decode(make_dense_decode_inputs([70, 0]))\n"
        "print(flash_mla.backends.cuda_missing)\n"
        "print(flash_mla.kernels(), flash_mla.build_info())"
    )
    result = run_python(code, FLASH_MLA_LIBRARY=str(broken))
    assert result.returncode == 0, result.stderr
    assert "does not load" in result.stdout
    assert "[] {}" in result.stdout
    assert "RuntimeWarning: flash_mla: the CUDA library" in result.stderr


def new_operations() -> dict[str, Callable[[], object]]:
    """A call for each operation that goes through `backends.serve` or `decode_calls.run`."""
    sparse, prefill = make_sparse_decode_inputs(2, h_q=2), make_sparse_prefill_inputs(2, h_q=2)
    fp8, dense = make_dense_fp8_inputs([70, 0], "V32"), make_dense_prefill_inputs([(3, 5)])
    cache = quantize_kv_cache(torch.zeros((5, 512), dtype=HALF), "V41", 4)
    return {
        "sparse_decode": lambda: check_decode(sparse),
        "dense_decode_fp8": lambda: check_decode(fp8),
        "sparse_prefill": lambda: check_sparse_prefill(prefill),
        "dense_prefill": lambda: check_dense_prefill(dense),
        "dequantize_kv_cache": lambda: dequantize_kv_cache(cache, "V41"),
    }


@pytest.mark.parametrize("name", list(new_operations()))
def test_what_an_operator_declines_goes_to_the_next_backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Only what was declined before a launch: never a failure."""
    call, texts = new_operations()[name], ["flash_mla[UnsupportedError] none takes it", "flash_mla[CudaError] it broke"]

    def refuse(*_: object) -> None:
        raise RuntimeError(texts[0])

    monkeypatch.setattr(backends, "active", replace(backends.AUTOMATIC, **{name: refuse}))
    reference.forget_warnings()
    with pytest.warns(RuntimeWarning, match="the reference backend serves"):
        call()
    texts.pop(0)
    with pytest.raises(RuntimeError, match=r"^it broke$"):
        call()


PROBLEM = flash_mla.DenseDecodeProblem("cuda", 90, torch.bfloat16, 8, 1, 16, 1, 576, 512, 64, 0.04)


def test_capability_queries() -> None:
    with pytest.raises(ValueError, match=r"op: wanted dense_decode or sparse_decode or .*, got 'decode'"):
        flash_mla.why_not("decode")
    with pytest.raises(TypeError, match="why_not: wanted a DenseDecodeProblem, or the tensors q= and k_cache="):
        flash_mla.why_not("dense_decode", q=torch.zeros(1))
    inputs = make_dense_decode_inputs([70])
    reason = flash_mla.why_not("dense_decode", **inputs.call())
    assert reason is not None
    assert reason.startswith("cuda: the tensors are on cpu; triton: ")
    with backends.use("cuda"):
        assert flash_mla.why_not("dense_decode", **inputs.call()) == "cuda: the tensors are on cpu"
        reason = flash_mla.why_not("dense_decode", PROBLEM)
    assert reason == (backends.cuda_missing and f"cuda: {backends.cuda_missing}")
    with pytest.raises(ValueError, match="problem: wanted a SparseDecodeProblem for sparse_decode, got DenseDecodePro"):
        flash_mla.why_not("sparse_decode", PROBLEM)


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
def test_a_prefill_that_no_kernel_takes() -> None:
    inputs = make_sparse_prefill_inputs(2, h_q=2)
    problem = flash_mla.SparsePrefillProblem.of(inputs.q, inputs.primary.cache, inputs.primary.indices)
    on_gpu = replace(problem, device_type="cuda", compute_capability=90)
    for d_v in (512, 448, 1):  # the kernels compute 512 columns, of which fewer may be wanted
        assert flash_mla.why_not("sparse_prefill", replace(on_gpu, d_v=d_v)) is None
        assert backends.select(replace(on_gpu, d_v=d_v)) is backends.CUDA
    wide = replace(on_gpu, d_v=576)
    assert "sm90_sparse_attention_bf16_576: head_dim_v must be 512" in str(backends.CUDA.why_not(wide))
    reason = flash_mla.why_not("sparse_prefill", wide)
    if backends.TRITON.why_not(wide) is None:
        assert reason is None
        assert backends.select(wide) is backends.TRITON
    else:
        assert "sm90_sparse_attention_bf16_576: head_dim_v must be 512" in str(reason)
        assert "; triton: " in str(reason)
        assert backends.select(wide) is backends.REFERENCE
    with backends.use("cuda"), pytest.raises(UnsupportedError, match="no backend takes the problem; cuda: "):
        backends.select(wide)


SPARSE = flash_mla.SparseDecodeProblem(
    "cuda", 90, KVFormat.V32, None, 8, 1, 128, 576, 64, None, 2048, 0, 512, 576**-0.5
)
V41 = {"kv_format": KVFormat.V41, "d_qk": 512}
# A change of SPARSE, or of PROBLEM for a dense one: the kernel that takes it, or the reason of one that does not.
SPARSE_TABLE: dict[str, tuple[dict[str, object], str]] = {
    "V32": ({}, "v32"),
    "MODEL1": ({"kv_format": KVFormat.MODEL1, "d_qk": 512}, "model1"),
    "V32_NO_ROPE": ({"kv_format": KVFormat.V32_NO_ROPE, "d_qk": 512}, "v32_no_rope"),
    "V41": (V41, "v41"),
    "two caches": ({**V41, "extra_kv_format": KVFormat.V41, "extra_page_block_size": 2, "extra_topk": 9}, "v41"),
    "FP4": ({**V41, "extra_kv_format": KVFormat.V41_FP4, "extra_page_block_size": 2, "extra_topk": 9}, "v41_fp4"),
    "BF16, 576": ({"kv_format": KVFormat.BF16}, "bf16_576"),
    "BF16, 512": ({"kv_format": KVFormat.BF16, "d_qk": 512}, "bf16_512"),
    "32 heads": ({"h_q": 32, "s_q": 9}, "v32"),
    "33 heads": ({"h_q": 33}, "v32"),
    "64 heads": ({"h_q": 64}, "v32"),
    "65 heads": ({"h_q": 65}, "v32"),
    "dense V32": ({"fp8_cache": "V32"}, "v32"),
    "dense V32, 33 rows": ({"fp8_cache": "V32", "h_q": 11, "s_q": 3}, "v32"),
    "dense V32, 66 rows": ({"fp8_cache": "V32", "h_q": 11, "s_q": 6}, "v32"),
    "dense V41": ({"fp8_cache": "V41", "d_qk": 512}, "v41"),
    "old GPU": ({"compute_capability": 80}, "v32: runs on compute capability 9.0 only"),
    "format": (V41, "model1: k_cache must be of format MODEL1"),
    "no FP4": (V41, "v41_fp4: extra_k_cache must be of format V41_FP4"),
    "other second cache": (
        {"extra_kv_format": KVFormat.MODEL1},
        "v32: extra_k_cache must be of the same format as k_cache",
    ),
    "d_qk": ({"kv_format": KVFormat.BF16}, "bf16_512: d_qk must be 512"),
    "d_v": ({"d_v": 256}, "v32: head_dim_v must be 512"),
    "scale": ({"softmax_scale": -0.5}, "v32: softmax_scale must not be negative"),
    "dense E4M3": ({"fp8_cache": "E4M3"}, "v32: k_cache must be of format V32"),
    "FP8 q": ({"fp8_cache": "V32", "dtype": torch.float8_e4m3fn}, "v32: q must be bfloat16"),
}
TAKEN_BY_TRITON = ("old GPU", "other second cache", "scale", "dense E4M3", "FP8 q")


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
@pytest.mark.parametrize("case", SPARSE_TABLE)
def test_the_table_of_sparse_attention(case: str) -> None:
    changes, wanted = SPARSE_TABLE[case]
    problem = replace(PROBLEM if "fp8_cache" in changes else SPARSE, **changes)
    table = backends.cuda.kernel_table(problem)
    kernel, _, reason = wanted.partition(": ")
    assert table[f"sm90_sparse_attention_{kernel}"] == reason
    takes = [name for name, why_not in table.items() if why_not == ""]
    with backends.use("cuda"):
        text = flash_mla.why_not(problem.op, problem)
    if reason == "":
        rows = problem.h_q * (problem.s_q if "fp8_cache" in changes else 1)
        few, paired = rows <= 32, rows > 64 and not kernel.startswith("bf16")
        assert takes == [
            *[f"sm90_sparse_few_heads_{kernel}"] * few,
            *[f"sm90_sparse_paired_{kernel}"] * paired,
            f"sm90_sparse_attention_{kernel}",
        ]
        assert text is None
        assert backends.select(problem) is backends.CUDA
    elif not takes:
        assert f"sm90_sparse_attention_{kernel}: {reason}" in text
        served = backends.TRITON.why_not(problem) is None
        assert served == (case in TAKEN_BY_TRITON and backends.triton.missing() is None)
        assert backends.select(problem) is (backends.TRITON if served else backends.REFERENCE)


needs_sm100_build = pytest.mark.skipif(
    "100f" not in flash_mla.build_info().get("archs", ""), reason="no kernels for SM100 are built"
)
NOT_A_BLACKWELL = "runs on compute capability 10.0 and 10.3 only, and has not been run on Blackwell hardware"


@needs_sm100_build
@pytest.mark.parametrize("case", SPARSE_TABLE)
def test_the_table_of_sparse_attention_on_blackwell(case: str) -> None:
    changes, wanted = SPARSE_TABLE[case]
    problem = replace(PROBLEM if "fp8_cache" in changes else SPARSE, **{"compute_capability": 100, **changes})
    table = backends.cuda.kernel_table(problem)
    kernel, _, reason = wanted.partition(": ")
    if "only" in reason:
        reason = NOT_A_BLACKWELL
    assert table[f"sm100_sparse_attention_{kernel}"] == reason
    if reason == "":
        rows = problem.h_q * (problem.s_q if "fp8_cache" in changes else 1)
        few, paired = rows <= 32, rows > 64
        takes = [name for name, why_not in table.items() if why_not == ""]
        assert takes == [
            *[f"sm100_sparse_few_heads_{kernel}"] * few,
            *[f"sm100_sparse_paired_{kernel}"] * paired,
            f"sm100_sparse_attention_{kernel}",
        ]
        assert backends.select(problem) is backends.CUDA


ONE_SCALE_ON_BLACKWELL: dict[str, tuple[dict[str, object], str]] = {
    "576, SM103": ({"compute_capability": 103}, "e4m3_576"),
    "512": ({"d_qk": 512, "h_q": 128}, "e4m3_512"),
    "FP8 q, 33 rows": ({"dtype": torch.float8_e4m3fn, "h_q": 11, "s_q": 3}, "e4m3_576"),
    "FP8 q, 32 rows": ({"dtype": torch.float8_e4m3fn, "h_q": 8, "s_q": 4, "d_qk": 512}, "e4m3_512"),
    "key heads": ({"h_kv": 2}, "e4m3_576: h_kv must be 1"),
    "d_qk": ({"d_qk": 512}, "e4m3_576: k_cache must be of e4m3 values with one scale, by block table"),
    "a format": (
        {"fp8_cache": "V41", "d_qk": 512},
        "e4m3_512: k_cache must be of e4m3 values with one scale, by block table",
    ),
    "fp16": ({"dtype": torch.float16}, "e4m3_576: q must be bfloat16"),
}


@needs_sm100_build
@pytest.mark.parametrize("case", ONE_SCALE_ON_BLACKWELL)
def test_the_table_of_caches_with_one_scale_on_blackwell(case: str) -> None:
    changes, wanted = ONE_SCALE_ON_BLACKWELL[case]
    problem = replace(PROBLEM, **{"compute_capability": 100, "fp8_cache": "E4M3", **changes})
    table = backends.cuda.kernel_table(problem)
    kernel, _, reason = wanted.partition(": ")
    assert table[f"sm100_sparse_attention_{kernel}"] == reason
    if reason == "":
        few = problem.h_q * problem.s_q <= 32
        takes = [name for name, why_not in table.items() if why_not == ""]
        assert takes == [*[f"sm100_sparse_few_heads_{kernel}"] * few, f"sm100_sparse_attention_{kernel}"]
        assert backends.select(problem) is backends.CUDA


DENSE_ON_BLACKWELL: dict[str, tuple[dict[str, object], str]] = {
    "bf16, 576": ({}, "bf16_576"),
    "bf16, 512, SM103": ({"d_qk": 512, "compute_capability": 103}, "bf16_512"),
    "fp16, 576": ({"dtype": torch.float16, "h_q": 128, "s_q": 3}, "fp16_576"),
    "fp16, 512": ({"dtype": torch.float16, "d_qk": 512, "page_block_size": 3}, "fp16_512"),
    "key heads, 32 rows": ({"h_kv": 2, "s_q": 4}, "bf16_576"),
    "33 rows": ({"h_q": 11, "s_q": 3}, "bf16_576"),
    "d_qk": ({"d_qk": 512}, "bf16_576: d_qk must be 576"),
    "d_v": ({"d_v": 256}, "bf16_576: head_dim_v must be 512"),
    "dtype": ({"dtype": torch.float16}, "bf16_576: q and k_cache must be bfloat16"),
    "scale": ({"softmax_scale": -0.5}, "bf16_576: softmax_scale must not be negative"),
    "SM120": ({"compute_capability": 120}, f"bf16_576: {NOT_A_BLACKWELL}"),
}


@needs_sm100_build
@pytest.mark.parametrize("case", DENSE_ON_BLACKWELL)
def test_the_table_of_dense_decode_on_blackwell(case: str) -> None:
    changes, wanted = DENSE_ON_BLACKWELL[case]
    problem = replace(PROBLEM, **{"compute_capability": 100, **changes})
    table = backends.cuda.kernel_table(problem)
    kernel, _, reason = wanted.partition(": ")
    assert table[f"sm100_dense_decode_{kernel}"] == reason
    if reason == "":
        rows = problem.s_q * problem.h_q // problem.h_kv
        few, paired = rows <= 32, rows > 64
        takes = [name for name, why_not in table.items() if why_not == ""]
        assert takes == [
            *[f"sm100_dense_decode_few_heads_{kernel}"] * few,
            *[f"sm100_dense_decode_paired_{kernel}"] * paired,
            f"sm100_dense_decode_{kernel}",
        ]
        assert backends.select(problem) is backends.CUDA


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
def test_the_scale_is_part_of_a_sparse_problem() -> None:
    """Only the kernel table needs it: the reference takes any scale."""
    inputs = make_sparse_decode_inputs(2, h_q=2)
    inputs.softmax_scale = -0.25
    check_decode(inputs)
    known = ("q", "k_cache", "indices", "softmax_scale", "kv_format")
    problem = flash_mla.SparseDecodeProblem.of(**{name: inputs.call()[name] for name in known})
    assert problem.softmax_scale == -0.25
    on_gpu = replace(problem, device_type="cuda", compute_capability=90)
    assert "sm90_sparse_attention_v32: softmax_scale must not be negative" in str(backends.CUDA.why_not(on_gpu))


def test_a_library_without_an_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older one than the package: its kernels serve what they know, and the rest is declined in words."""
    monkeypatch.setattr(_ops, "why_not_loaded", None)
    monkeypatch.setattr(_ops, "NATIVE", frozenset({"dense_decode", "plan_dense_decode"}))
    text = "no CUDA kernel for sparse_decode is built yet in this version of flash_mla"
    assert backends.CUDA.why_not(SPARSE) == text
    assert backends.cuda.kernel_table(SPARSE) == {}
    assert backends.CUDA.why_not(replace(PROBLEM, fp8_cache="V32")) == text.replace("sparse_decode", "dense_decode_fp8")
    assert _ops.num_sparse_parts(torch.device("cuda"), 1, 128) == 8


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
def test_kernels_of_kv_caches_without_a_gpu() -> None:
    problem = flash_mla.KVCacheProblem("cuda", 90, flash_mla.KVFormat.V41, 64)
    assert flash_mla.why_not("kv_cache", problem) is None
    assert backends.select(problem) is backends.CUDA
    problem = replace(problem, compute_capability=80)
    text = "this build has no code for compute capability 8.0"
    assert backends.CUDA.why_not(problem) == text
    if backends.TRITON.why_not(problem) is None:
        assert flash_mla.why_not("kv_cache", problem) is None
        assert backends.select(problem) is backends.TRITON
    else:
        assert str(flash_mla.why_not("kv_cache", problem)).startswith(f"cuda: {text}; triton: ")
        assert backends.select(problem) is backends.REFERENCE


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
def test_the_kernel_table_without_a_gpu() -> None:
    kernels = {support.kernel for support in flash_mla.kernels() if support.op == PROBLEM.op}
    kernels = {kernel for kernel in kernels if "dense_decode" in kernel}
    for change in ({"dtype": torch.float32}, {"d_qk": 128}, {"d_v": 256}, {"compute_capability": 80}):
        problem = replace(PROBLEM, **change)
        with backends.use("cuda"):
            reason = flash_mla.why_not("dense_decode", problem)
        assert reason is not None
        assert kernels
        for kernel in kernels:
            assert f"{kernel}: " in reason
        with pytest.raises(UnsupportedError, match=r"; cuda: .*: "), backends.use("cuda"):
            backends.select(problem)
        served = backends.TRITON.why_not(problem) is None
        assert served == ("compute_capability" in change and backends.triton.missing() is None)
        assert backends.select(problem) is (backends.TRITON if served else backends.REFERENCE)
    assert backends.select(PROBLEM) is backends.CUDA


OPS_WITH_KERNELS = (
    "dense_decode",
    "sparse_decode",
    "sparse_prefill_backward",
    "dense_prefill",
    "dense_prefill_backward",
)


@pytest.mark.skipif(backends.cuda_missing is not None, reason=str(backends.cuda_missing))
def test_the_support_matrix_says_what_the_table_says() -> None:
    supported = flash_mla.kernels()
    assert supported
    for entry in supported:
        assert bool(entry.reason) == (not entry.dtypes)
    hopper = [entry for entry in supported if entry.compute_capability == 90 and not entry.reason]
    taken = {op: {kind for entry in hopper if entry.op == op for kind in entry.dtypes} for op in OPS_WITH_KERNELS}
    formats = {"V32", "V32_NO_ROPE", "MODEL1", "V41"}
    assert taken["dense_decode"] == {"bfloat16", "float16", "e4m3 with descale_k", *formats}
    assert taken["sparse_decode"] == {"BF16", "V41 + V41_FP4", *formats}
    assert taken["sparse_prefill_backward"] == {"BF16"}
    assert taken["dense_prefill"] == taken["dense_prefill_backward"] == {"bfloat16", "float16"}
    prefill = [entry for entry in hopper if entry.op in ("dense_prefill", "dense_prefill_backward")]
    assert {d_qk for entry in prefill for d_qk in entry.d_qk} == {192, 128}
    for entry in prefill:
        assert entry.page_block_sizes == (0,)
        assert entry.h_kv == (1, 2, 3, 8)
    paged = [entry for entry in hopper if entry not in prefill]
    assert {d_qk for entry in paged for d_qk in entry.d_qk} == {576, 512}
    for entry in paged:
        assert entry.page_block_sizes == (1, 3, 16, 32, 64, 128, 256, 1000)
        assert entry.h_kv == ((1, 2, 3, 8) if "float16" in "".join(entry.dtypes) else (1,))


# ---- The native library's errors.


@pytest.mark.parametrize(
    ("mark", "expected"),
    [
        ("ValueError", ValueError),
        ("TypeError", TypeError),
        ("UnsupportedError", UnsupportedError),
        ("CudaError", RuntimeError),
    ],
)
def test_native_errors_become_python_errors(mark: str, expected: type[Exception]) -> None:
    native = RuntimeError(
        f"flash_mla[{mark}] q must be\nhere\nException raised from run at x.cpp:1 (most recent call first)"
    )
    translated = errors.from_native(native)
    assert type(translated) is expected
    assert str(translated) == "q must be\nhere"


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("out of memory"), KeyError("x"), RuntimeError("flash_mla[Nonsense] x")):
        assert errors.from_native(error) is error
