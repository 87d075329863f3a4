"""merge_attention_states: attention over the union of the keys, from attentions over its parts."""

import math

import pytest
import torch
from conftest import Target
from torch import Tensor

from flash_mla import merge_attention_states
from flash_mla.testing import assert_close, check_dense_decode, make_dense_decode_inputs, run_dense_decode

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def truth(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition, in float64, for parts `[b, s_q, h_q, d]` or `[tokens, h_q, d]`."""
    lse = torch.stack(lses).double()
    mass = torch.where(lse.isinf(), 0.0, (lse - torch.where(lse.isinf(), -math.inf, lse).amax(0).nan_to_num(0)).exp())
    share = mass / mass.sum(0).clamp(min=1e-300)
    if outs[0].dim() == 4:
        share = share.transpose(2, 3)
    out = sum(
        torch.where(w[..., None] > 0, part.double(), 0.0) * w[..., None] for part, w in zip(outs, share, strict=True)
    )
    total = torch.where(lse.isinf(), -math.inf, lse).logsumexp(0)
    return out, torch.where(total == -math.inf, math.inf, total)


def check_merge(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    out, lse = merge_attention_states(outs, lses)
    assert out.shape == outs[0].shape
    assert lse.shape == lses[0].shape
    true_out, true_lse = truth(outs, lses)
    emulated = sum(
        torch.where(w[..., None] > 0, part.float(), 0.0) * w[..., None]
        for part, w in zip(outs, weights_in_float32(outs, lses), strict=True)
    )
    assert_close("out", out, true_out, emulated.to(out.dtype))
    assert_close("lse", lse, true_lse, true_lse.float())
    return out, lse


def weights_in_float32(outs: list[Tensor], lses: list[Tensor]) -> Tensor:
    lse = torch.stack(lses)
    lse = torch.where(lse.isinf(), -math.inf, lse)
    share = torch.where(lse == -math.inf, 0.0, lse.softmax(0))
    return share.transpose(2, 3) if outs[0].dim() == 4 else share


def random_parts(
    shape: tuple[int, ...], parts: int, dtype: torch.dtype, device: str, empty: float = 0.0
) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(parts)
    lse_shape = (shape[0], shape[2], shape[1]) if len(shape) == 4 else shape[:2]
    outs, lses = [], []
    for _ in range(parts):
        out = torch.randn(shape, generator=generator)
        lse = 4 * torch.randn(lse_shape, generator=generator)
        none = torch.rand(lse_shape, generator=generator) < empty
        lse.masked_fill_(none, math.inf)
        out.masked_fill_((none.transpose(1, 2) if len(shape) == 4 else none)[..., None], 0.0)
        outs.append(out.to(dtype).to(device))
        lses.append(lse.to(device))
    return outs, lses


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("parts", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("shape", [(3, 2, 9, 512), (1, 1, 1, 512), (5, 7, 512), (4, 16, 128), (2, 3, 5, 40)])
def test_random_parts(backend: Target, shape: tuple[int, ...], parts: int, dtype: torch.dtype) -> None:
    check_merge(*random_parts(shape, parts, dtype, backend.device))


@pytest.mark.parametrize("shape", [(3, 2, 9, 512), (31, 7, 512)])
def test_parts_without_keys_are_neutral(backend: Target, shape: tuple[int, ...]) -> None:
    check_merge(*random_parts(shape, 3, torch.bfloat16, backend.device, empty=0.5))


def test_an_empty_part_may_hold_anything(backend: Target) -> None:
    outs, lses = random_parts((3, 2, 8, 512), 2, torch.bfloat16, backend.device)
    for absent in (math.inf, -math.inf):
        out, lse = merge_attention_states(
            [*outs, torch.full_like(outs[0], math.nan)], [*lses, torch.full_like(lses[0], absent)]
        )
        wanted = merge_attention_states(outs, lses)
        assert torch.equal(out, wanted[0])
        assert torch.equal(lse, wanted[1])


def test_no_part_has_keys(backend: Target) -> None:
    outs, lses = random_parts((3, 2, 8, 512), 2, torch.bfloat16, backend.device)
    out, lse = merge_attention_states(outs, [torch.full_like(part, math.inf) for part in lses])
    assert not out.any()
    assert bool((lse == math.inf).all())


def test_one_part_comes_back_unchanged(backend: Target) -> None:
    outs, lses = random_parts((3, 2, 8, 512), 1, torch.bfloat16, backend.device, empty=0.2)
    out, lse = merge_attention_states(outs, lses)
    assert torch.equal(out, outs[0])
    torch.testing.assert_close(lse, lses[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("level", [-1e4, -100.0, 100.0, 1e4])
def test_large_logarithms(backend: Target, level: float) -> None:
    outs, lses = random_parts((3, 2, 8, 512), 3, torch.float32, backend.device)
    check_merge(outs, [lse + level for lse in lses])


def test_strided_parts(backend: Target) -> None:
    outs, lses = random_parts((3, 4, 8, 512), 2, torch.bfloat16, backend.device)
    wanted = merge_attention_states(
        [out[:, ::2].contiguous() for out in outs], [lse[..., ::2].contiguous() for lse in lses]
    )
    out, lse = merge_attention_states([out[:, ::2] for out in outs], [lse[..., ::2] for lse in lses])
    assert torch.equal(out, wanted[0])
    assert torch.equal(lse, wanted[1])


@pytest.mark.parametrize("parts", [2, 5])
def test_attention_over_disjoint_keys(backend: Target, parts: int) -> None:
    """Context parallelism: each part holds a range of pages; together they are the whole attention."""
    page, pages = 16, 20
    length = page * pages - 5
    whole = make_dense_decode_inputs([length], s_q=2, h_q=16, page=page, device=backend.device)
    outs, lses = [], []
    for rank in range(parts):
        first, last = rank * pages // parts, (rank + 1) * pages // parts
        part = whole.rows(slice(0, 1))
        part.block_table = whole.block_table[:, first:last].contiguous()
        part.cache_seqlens = torch.tensor([min(length, last * page) - first * page], device=backend.device).int()
        out, lse = run_dense_decode(part)
        outs.append(out.float())
        lses.append(lse)
    out, lse = merge_attention_states(outs, lses)
    check_dense_decode(whole, result=(out.to(whole.q.dtype), lse))


def test_results_do_not_require_gradients(backend: Target) -> None:
    outs, lses = random_parts((3, 2, 8, 512), 2, torch.float32, backend.device)
    outs[0].requires_grad_()
    out, lse = merge_attention_states(outs, lses)
    assert not out.requires_grad
    assert not lse.requires_grad


WRONG = {
    "no parts": (lambda o, l: ([], []), ValueError, "outs: wanted 1 to 16 parts, got 0"),
    "too many parts": (lambda o, l: (o * 9, l * 9), ValueError, "outs: wanted 1 to 16 parts, got 18"),
    "stride": (
        lambda o, l: ([o[0], o[1].transpose(2, 3).contiguous().transpose(2, 3)], l),
        ValueError,
        r"outs\[1\]: wanted a contiguous last dimension",
    ),
    "counts": (lambda o, l: (o, l[:1]), ValueError, "lses: wanted one tensor per part, 2, got 1"),
    "not tensors": (lambda o, l: ([1, 2], l), TypeError, r"outs\[0\]: wanted a tensor"),
    "dims": (lambda o, l: ([part[0, 0] for part in o], l), ValueError, r"outs\[0\]: wanted a tensor"),
    "dtype": (lambda o, l: ([part.double() for part in o], l), TypeError, r"outs\[0\]: wanted torch.bfloat16 or"),
    "mixed dtypes": (lambda o, l: ([o[0], o[1].float()], l), TypeError, r"outs\[1\]: wanted torch.bfloat16, like outs"),
    "shapes": (lambda o, l: ([o[0], o[1][:1]], l), ValueError, r"outs\[1\]: wanted shape \[3, 2, 8, 512\], like outs"),
    "lse dtype": (lambda o, l: (o, [l[0], l[1].half()]), TypeError, r"lses\[1\]: wanted torch.float32, got"),
    "lse shape": (
        lambda o, l: (o, [part.transpose(1, 2) for part in l]),
        ValueError,
        r"lses\[0\]: wanted shape \[b, h_q, s_q\] = \[3, 8, 2\], got \[3, 2, 8\]",
    ),
    "lse dims": (lambda o, l: (o, [part[0] for part in l]), ValueError, r"lses\[0\]: wanted 3 dimensions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments_are_named(backend: Target, case: str) -> None:
    spoil, error, text = WRONG[case]
    outs, lses = random_parts((3, 2, 8, 512), 2, torch.bfloat16, backend.device)
    with pytest.raises(error, match=text):
        merge_attention_states(*spoil(outs, lses))
