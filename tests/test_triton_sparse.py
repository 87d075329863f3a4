"""The Triton kernels of sparse decode, on plain tensors: cache formats bit for bit, and attention against float64."""

import math
from dataclasses import dataclass

import pytest
import torch
from conftest import triton_missing
from torch import Tensor

from flash_mla import backends, quantize_kv_cache
from flash_mla.backends import triton as backend
from flash_mla.backends.reference_schedule import plan_in_torch
from flash_mla.testing import assert_close, make_sparse_decode_inputs, run_decode

pytestmark = pytest.mark.skipif(triton_missing() is not None, reason=f"triton: {triton_missing()}")

if triton_missing() is None:
    import triton.language as tl

    from flash_mla.backends.triton import dequant, sparse_decode
    from flash_mla.backends.triton.dequant import Format
    from flash_mla.backends.triton.language import jit

    @jit
    def convert(codes: tl.tensor, out: tl.tensor, KIND: tl.constexpr, HARDWARE: tl.constexpr) -> None:
        at = tl.arange(0, 256)
        code = tl.load(codes + at)
        if KIND == 0:
            value = dequant.e4m3_to_float32(code, HARDWARE)
        elif KIND == 1:
            value = dequant.ue8m0_to_float32(code)
        else:
            value = dequant.e2m1_to_float32(code & 0xF)
        tl.store(out + at, value)


DEVICE = "cuda" if torch.cuda.is_available() and not backend.config.interpreting() else "cpu"


def converted(kind: int, hardware: bool = False) -> Tensor:
    codes = torch.arange(256, device=DEVICE).to(torch.uint8)
    out = torch.empty(256, device=DEVICE)
    convert[(1,)](codes, out, KIND=kind, HARDWARE=hardware)
    return out.cpu()


E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.mark.parametrize("hardware", [False, True])
def test_every_e4m3_code(hardware: bool) -> None:
    """Bit for bit what torch converts, NaN in the same two places."""
    if hardware and (DEVICE == "cpu" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("only a GPU of compute capability 8.9 or newer converts FP8 itself")
    wanted = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    actual = converted(0, hardware)
    assert torch.equal(actual.isnan(), wanted.isnan())
    assert int(wanted.isnan().sum()) == 2
    numbers = ~wanted.isnan()
    assert torch.equal(actual[numbers].view(torch.int32), wanted[numbers].view(torch.int32))


def test_every_ue8m0_code() -> None:
    exact = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.inf], dtype=torch.float64)
    assert torch.equal(converted(1).double(), exact)


def test_every_e2m1_code() -> None:
    wanted = torch.cat([E2M1, -E2M1]).repeat(16)
    assert torch.equal(converted(2).view(torch.int32), wanted.view(torch.int32))


# ---- Caches, written and read back in PyTorch.


@dataclass
class Cache:
    """A cache in some format, and the values of its slots as a kernel must see them."""

    name: str
    tensor: Tensor
    values: Tensor
    """bfloat16 `[num_blocks * page, d_qk]`."""


FORMATS = ["BF16_576", "BF16_512", "V32", "V32_NO_ROPE", "MODEL1", "V41", "V41_FP4"]
ROPE_FORMATS = ("BF16_576", "V32")


def codes(generator: torch.Generator, *shape: int) -> Tensor:
    """e4m3 codes of normally distributed numbers, no NaN."""
    return torch.randn(shape, generator=generator).to(torch.float8_e4m3fn).view(torch.uint8)


def make_cache(name: str, num_blocks: int, page: int, seed: int) -> Cache:
    g = torch.Generator().manual_seed(seed)
    slots = num_blocks * page
    if name.startswith("BF16"):
        values = torch.randn(slots, int(name[5:]), generator=g).bfloat16()
        return Cache(name, values.view(num_blocks, page, 1, -1).clone(), values)
    rope = torch.randn(slots, 64, generator=g).bfloat16()
    if name == "V41_FP4":
        pairs = torch.randint(0, 256, (slots, 256), generator=g).to(torch.uint8)
        scale = torch.rand(slots, 32, generator=g).add(0.1).to(torch.float8_e4m3fn)
        table = torch.cat([E2M1, -E2M1])
        stored = torch.stack([table[(pairs & 15).long()], table[(pairs >> 4).long()]], -1).view(slots, 512)
        values = (stored.view(slots, 32, 16) * scale.float()[:, :, None]).view(slots, 512).bfloat16()
        return Cache(name, torch.cat([pairs, scale.view(torch.uint8)], 1).view(num_blocks, page, 1, 288), values)
    nope = 448 if name == "MODEL1" else 512
    stored = codes(g, slots, nope)
    number = stored.view(torch.float8_e4m3fn).float()
    if name in ("V32", "V32_NO_ROPE"):
        scale = torch.rand(slots, 4, generator=g) + 0.37
        values = (number.view(slots, 4, 128) * scale[:, :, None]).view(slots, 512).bfloat16()
        parts = [stored, scale.view(torch.uint8)]
        if name == "V32":
            values = torch.cat([values, rope], 1)
            parts.append(rope.view(torch.uint8))
        return Cache(name, torch.cat(parts, 1).view(num_blocks, page, 1, -1), values)
    size = 64 if name == "MODEL1" else 32
    scale_codes = torch.randint(124, 130, (slots, nope // size), generator=g).to(torch.uint8)
    scale = torch.exp2(scale_codes.float() - 127)
    values = (number.view(slots, -1, size) * scale[:, :, None]).view(slots, nope).bfloat16()
    if name == "V41":
        return Cache(name, torch.cat([stored, scale_codes], 1).view(num_blocks, page, 1, 528), values)
    values = torch.cat([values, rope], 1)
    stride = -(-584 * page // 576) * 576
    room = torch.full((num_blocks, stride), 0xFF, dtype=torch.uint8)
    tokens = torch.cat([stored, rope.view(torch.uint8)], 1).view(num_blocks, page * 576)
    room[:, : 576 * page] = tokens
    padded = torch.nn.functional.pad(scale_codes, (0, 1), value=0xFF)
    room[:, 576 * page : 584 * page] = padded.view(num_blocks, 8 * page)
    return Cache(name, room.as_strided((num_blocks, page, 1, 584), (stride, 584, 584, 1)), values)


# ---- Attention.


@dataclass
class Lanes:
    """One index list of every query, with lengths."""

    cache: Cache
    indices: Tensor
    length: Tensor | None


def make_lanes(cache: Cache, b: int, s_q: int, topk: int, lengths: object, seed: int) -> Lanes:
    """Random valid indices with duplicates, some invalid ones, and garbage at and past the lengths.

    No valid one is slot 0, which a masked lane might read in place of nothing.
    """
    g = torch.Generator().manual_seed(seed)
    slots = cache.values.shape[0]
    indices = torch.randint(1, slots, (b, s_q, topk), generator=g)
    wrong = torch.tensor([-1, slots, 2**31 - 1, -(2**31), -1])
    spoiled = torch.rand(b, s_q, topk, generator=g) < 0.2
    indices = torch.where(spoiled, wrong[torch.randint(0, 5, (b, s_q, topk), generator=g)], indices)
    return Lanes(cache, indices.int(), None if lengths is None else torch.tensor(lengths, dtype=torch.int32))


def visible(lanes: Lanes) -> Tensor:
    """bool `[b, s_q, topk]`."""
    b, _, topk = lanes.indices.shape
    valid = (lanes.indices >= 0) & (lanes.indices < lanes.cache.values.shape[0])
    if lanes.length is not None:
        valid &= torch.arange(topk) < lanes.length.view(b, -1, 1)
    return valid


def poison(lanes: list[Lanes]) -> None:
    """Fill every slot that no valid lane names with NaN: 0xFF is NaN in every format, as code and as scale."""
    for one in lanes:
        used = torch.zeros(one.cache.values.shape[0], dtype=torch.bool)
        for other in lanes:
            if other.cache is one.cache:
                used[other.indices[visible(other)].long()] = True
        num_blocks, page = one.cache.tensor.shape[:2]
        for slot in (~used).nonzero().flatten().tolist():
            block, offset = divmod(slot, page)
            tensor = one.cache.tensor
            if tensor.dtype == torch.bfloat16:
                tensor[block, offset] = math.nan
            elif tensor.shape[-1] == 584:
                flat = tensor.as_strided((num_blocks, tensor.stride(0)), (tensor.stride(0), 1))
                flat[block, 576 * offset : 576 * (offset + 1)] = 0xFF
                flat[block, 576 * page + 8 * offset : 576 * page + 8 * (offset + 1)] = 0xFF
            else:
                tensor[block, offset] = 0xFF


def attend(
    q: Tensor, lanes: list[Lanes], sink: Tensor | None, scale: float, dtype: torch.dtype, emulate: bool
) -> tuple[Tensor, Tensor]:
    """The definition, dense: one softmax over the keys of all lists. With `emulate`, probabilities are rounded."""
    keys, masks = [], []
    for one in lanes:
        mask = visible(one)
        keys.append(one.cache.values[torch.where(mask, one.indices, 0).long()].to(dtype))
        masks.append(mask)
    k, mask = torch.cat(keys, 2), torch.cat(masks, 2)[:, :, None]
    scores = torch.einsum("bshd,bskd->bshk", q.to(dtype), k) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True)
    top = top.masked_fill(top == -math.inf, 0.0)
    p = (scores - top).exp()
    total = p.sum(-1, keepdim=True)
    if emulate:
        p = p.to(q.dtype).to(dtype)
    out = torch.einsum("bshk,bskd->bshd", p, k[..., :512]) / total.clamp(min=1e-300)
    lse = (top + total.log())[..., 0]
    if sink is not None:
        out = out * torch.sigmoid(lse - sink.to(dtype))[..., None]
    none = total[..., 0] == 0
    return out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, math.inf).transpose(1, 2)


def on_device(tensor: Tensor) -> Tensor:
    """A copy with the same strides: those of padded pages overlap, which `.to` would not keep."""
    storage = tensor.untyped_storage().to(device=DEVICE).clone()
    return torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(storage, 0, tensor.shape, tensor.stride())


def keys_of(lanes: Lanes) -> "sparse_decode.Keys":
    length = None if lanes.length is None else lanes.length.to(DEVICE)
    return sparse_decode.Keys(on_device(lanes.cache.tensor), Format[lanes.cache.name], lanes.indices.to(DEVICE), length)


def plan(lanes: list[Lanes], parts: int) -> tuple[Tensor, Tensor]:
    """A schedule over the blocks of all lists, made for the longest query of each request."""
    blocks = 0
    for one, least in zip(lanes, (1, 0), strict=False):
        b, _, topk = one.indices.shape
        longest = torch.full((b,), topk) if one.length is None else one.length.view(b, -1).amax(1).clamp(0, topk)
        blocks = blocks + (-(-longest // 64)).clamp(min=least)
    return plan_in_torch((64 * blocks).int().to(DEVICE), parts)


def run(q: Tensor, lanes: list[Lanes], sink: Tensor | None, parts: int | None) -> tuple[Tensor, Tensor]:
    """The kernels; `parts` None stands for the batch-invariant mode. Outputs begin as NaN."""
    b, s_q, h_q, d_qk = q.shape
    out = torch.full((b, s_q, h_q, 512), math.nan, dtype=q.dtype, device=DEVICE)
    lse = torch.full((b, h_q, s_q), math.nan, device=DEVICE)
    extra = keys_of(lanes[1]) if len(lanes) > 1 else None
    moved_sink = None if sink is None else sink.to(DEVICE)
    call = sparse_decode.Call(q.to(DEVICE), keys_of(lanes[0]), extra, moved_sink, d_qk**-0.5, out, lse)
    if parts is None:
        sparse_decode.sparse_decode_batch_invariant(call)
    else:
        sparse_decode.sparse_decode(call, *plan(lanes, parts))
    return out.cpu(), lse.cpu()


def check(q: Tensor, lanes: list[Lanes], sink: Tensor | None, parts: int | None) -> tuple[Tensor, Tensor]:
    out, lse = run(q, lanes, sink, parts)
    scale = q.shape[-1] ** -0.5
    true_out, true_lse = attend(q, lanes, sink, scale, torch.float64, False)
    near_out, near_lse = attend(q, lanes, sink, scale, torch.float32, True)
    assert_close("out", out, true_out, near_out.to(q.dtype))
    assert_close("lse", lse, true_lse, near_lse)
    return out, lse


def query(b: int, s_q: int, h_q: int, d_qk: int) -> Tensor:
    return torch.randn(b, s_q, h_q, d_qk, generator=torch.Generator().manual_seed(9)).bfloat16()


@pytest.mark.parametrize("parts", [1, 3, None], ids=["whole", "split", "batch_invariant"])
@pytest.mark.parametrize("name", FORMATS)
def test_formats(name: str, parts: int | None) -> None:
    """Two caches of one format, lengths, invalid indices, sinks, and NaN wherever no valid lane leads."""
    b, s_q, h_q = 2, 1, 5
    lanes = [
        make_lanes(make_cache(name, 5, 7, 1), b, s_q, 150, [130, 70], 2),
        make_lanes(make_cache(name, 3, 2, 3), b, s_q, 66, [66, 3], 4),
    ]
    poison(lanes)
    sink = torch.randn(h_q, generator=torch.Generator().manual_seed(5))
    check(query(b, s_q, h_q, 576 if name in ROPE_FORMATS else 512), lanes, sink, parts)


@pytest.mark.parametrize("page", [1, 2, 64])
def test_model1_pages(page: int) -> None:
    lanes = [make_lanes(make_cache("MODEL1", 9, page, 1), 1, 1, 70, None, 2)]
    poison(lanes)
    check(query(1, 1, 16, 512), lanes, None, 1)


def test_an_fp4_cache_beside_a_v41_one() -> None:
    first = make_lanes(make_cache("V41", 4, 16, 1), 2, 1, 64, [64, 9], 2)
    extra = make_lanes(make_cache("V41_FP4", 3, 32, 3), 2, 1, 100, [100, 0], 4)
    poison([first, extra])
    check(query(2, 1, 20, 512), [first, extra], None, 4)


@pytest.mark.parametrize("parts", [1, 5, None])
def test_lengths_of_each_query(parts: int | None) -> None:
    """Lengths `[b, s_q]`, zero among them, also of a primary whose extra cache has keys."""
    first = make_lanes(make_cache("V32_NO_ROPE", 4, 16, 1), 2, 3, 200, [[0, 200, 1], [64, 0, 65]], 2)
    extra = make_lanes(make_cache("BF16_512", 3, 8, 3), 2, 3, 70, [[5, 0, 70], [0, 0, 64]], 4)
    poison([first, extra])
    out, lse = check(query(2, 3, 3, 512), [first, extra], torch.zeros(3), parts)
    assert not out[1, 1].any()
    assert bool((lse[1, :, 1] == math.inf).all())


def test_no_valid_index() -> None:
    lanes = [make_lanes(make_cache("V32", 2, 4, 1), 2, 1, 9, None, 2)]
    lanes[0].indices.fill_(-1)
    poison(lanes)
    out, lse = check(query(2, 1, 4, 576), lanes, torch.full((4,), -math.inf), 2)
    assert not out.any()
    assert bool((lse == math.inf).all())


@pytest.mark.parametrize("topk", [1, 70, 1024, 2500])
def test_compacting(topk: int) -> None:
    """The valid indices, in their order, and how many there are; also of queries that have none or have all."""
    lanes = make_lanes(make_cache("V32_NO_ROPE", 3, 4, 1), 2, 3, topk, [[0, topk, 1], [topk - 1, topk, topk]], 2)
    lanes.indices[1, 1] = -1
    lanes.indices[1, 2] = 5
    keys = keys_of(lanes)
    compacted = sparse_decode._compacted(keys)
    for indices, length, row, mask in zip(
        compacted.indices.flatten(0, 1).cpu(),
        compacted.length.flatten().tolist(),
        lanes.indices.flatten(0, 1),
        visible(lanes).flatten(0, 1),
        strict=True,
    ):
        assert torch.equal(indices[:length], row[mask])


def padded(lanes: Lanes, request: int, seed: int) -> Lanes:
    """One request, its lanes that count spread among twice as many that do not."""
    mask = visible(lanes)[request, 0]
    topk = 3 * mask.numel()
    where = torch.randperm(topk, generator=torch.Generator().manual_seed(seed))[: int(mask.sum())].sort().values
    indices = torch.full((1, 1, topk), -1, dtype=torch.int32)
    indices[0, 0, where] = lanes.indices[request, 0, mask]
    return Lanes(lanes.cache, indices, None)


def test_batch_invariance() -> None:
    """A request alone and among others, with a shorter index list or a sparser one: the same bits."""
    lanes = make_lanes(make_cache("V32", 30, 64, 1), 3, 1, 1100, [1100, 20, 600], 2)
    q = query(3, 1, 4, 576)
    out, lse = run(q, [lanes], None, None)
    for request, topk in ((0, 1100), (1, 64), (2, 601)):
        one = slice(request, request + 1)
        alone = Lanes(lanes.cache, lanes.indices[one, :, :topk].contiguous(), lanes.length[one])
        for one_alone in (alone, padded(lanes, request, seed=request)):
            other_out, other_lse = run(q[one], [one_alone], None, None)
            assert torch.equal(other_out, out[one])
            assert torch.equal(other_lse, lse[one])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_captured_graph_follows_the_tensors(batch_invariant: bool) -> None:
    """Planned while it is captured; replayed over other indices and lengths it gives what a call gives then."""
    inputs, others = (
        make_sparse_decode_inputs(
            4, 2, h_q=16, topk=1100, lengths="token", extra_topk=90, sink=True, seed=seed, device=DEVICE
        )
        for seed in (1, 2)
    )
    # One cache of each kind for both, full: what no index of its own input names would be NaN.
    for side, other in ((inputs.primary, others.primary), (inputs.extra, others.extra)):
        num_blocks, page = side.cache.shape[:2]
        rows = torch.randn(num_blocks * page, 576, generator=torch.Generator().manual_seed(3)).bfloat16()
        side.cache = other.cache = quantize_kv_cache(rows, "V32", page).to(DEVICE)
    with backends.use("triton"):
        wanted = [run_decode(each, enable_batch_invariant=batch_invariant) for each in (inputs, others)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_decode(inputs, enable_batch_invariant=batch_invariant)
        for answer, now in zip(wanted, (inputs, others), strict=True):
            inputs.q.copy_(now.q)
            inputs.attn_sink.copy_(now.attn_sink)
            for side, other in ((inputs.primary, now.primary), (inputs.extra, now.extra)):
                side.indices.copy_(other.indices)
            inputs.primary.lengths.copy_(now.primary.lengths)
            graph.replay()
            for one, other in zip(captured, answer, strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("scale", [0.7, 3.0e-5, 1.0 + 2.0**-20])
def test_float32_scales_are_used_as_they_are(scale: float) -> None:
    """Any positive float: neither rounded to a power of two nor to bfloat16."""
    cache = make_cache("V32_NO_ROPE", 1, 8, 1)
    number = cache.tensor[..., :512].contiguous().view(torch.float8_e4m3fn).float()
    cache.tensor[..., 512:] = torch.full((4,), scale).view(torch.uint8)
    cache.values = (number * torch.tensor(scale)).bfloat16().view(8, 512)
    indices = torch.arange(8, dtype=torch.int32).view(8, 1, 1)
    # One key alone: the output is that key.
    out, _ = run(query(8, 1, 1, 512), [Lanes(cache, indices, None)], None, 1)
    assert torch.equal(out.view(8, 512), cache.values)
