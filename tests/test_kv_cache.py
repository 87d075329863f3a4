"""KV-cache formats: every byte against plain arithmetic, one value at a time."""

import math
import struct
from contextlib import nullcontext

import pytest
import torch
from conftest import Target
from torch import Tensor

import flash_mla
from flash_mla import KVFormat, append_kv_cache, backends, dequantize_kv_cache, kv_format, quantize_kv_cache
from flash_mla.backends import reference
from flash_mla.testing import poisoned_cache

OP = "kv_cache"
BYTE_FORMATS = [known for known in KVFormat if known is not KVFormat.BF16]
PAGES = (1, 2, 53, 64, 69, 256, 576)


def memory_of(tensor: Tensor) -> Tensor:
    """Every byte of its storage, padding included."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def placed(tensor: Tensor, device: str) -> Tensor:
    """`tensor` on a device, storage and strides as they are: `.to` closes the gaps of a tensor that is not dense."""
    memory = memory_of(tensor).to(device)
    return memory.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# ---- The formats again, as plain as they can be written. Floats are Python's (float64) where nothing else is said.


def e4m3(byte: int) -> float:
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    return sign * (mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def e2m1(code: int) -> float:
    value = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)[code & 7]
    return -value if code & 8 else value


def float32(value: float) -> float:
    """Rounded to float32; infinity where that is too large."""
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def bfloat16_bits(value: float) -> int:
    """Of a float32 value: nearest, ties to even."""
    if math.isnan(value):
        return 0x7FC0
    bits = struct.unpack("<I", struct.pack("<f", value))[0]
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def row_bytes(cache: Tensor, known: KVFormat, slot: int) -> tuple[bytes, bytes, bytes]:
    """The bytes of a row's quantised values, of its scales and of its RoPE values, from where the table puts them."""
    page = cache.shape[1]
    block, t = divmod(slot, page)
    start = block * cache.stride(0)
    memory = memory_of(cache)[cache.storage_offset() :]

    def cut(begin: int, count: int) -> bytes:
        return bytes(memory[start + begin : start + begin + count].tolist())

    if known is KVFormat.MODEL1:
        return cut(576 * t, 448), cut(576 * page + 8 * t, 7), cut(576 * t + 448, 128)
    size, values, scales, rope = {
        KVFormat.V32: (656, 512, 16, 128),
        KVFormat.V32_NO_ROPE: (528, 512, 16, 0),
        KVFormat.V41: (528, 512, 16, 0),
        KVFormat.V41_FP4: (288, 256, 32, 0),
    }[known]
    return (
        cut(size * t, values),
        cut(size * t + values, scales),
        cut(size * t + values + scales, rope),
    )


def naive_row(cache: Tensor, known: KVFormat, slot: int) -> list[int]:
    """bfloat16 bits of a row."""
    values, scale_bytes, rope = row_bytes(cache, known, slot)
    if known in (KVFormat.V32, KVFormat.V32_NO_ROPE):
        scales = list(struct.unpack("<4f", scale_bytes))
    elif known is KVFormat.V41_FP4:
        scales = [e4m3(byte) for byte in scale_bytes]
    else:
        scales = [2.0 ** (byte - 127) if byte < 255 else math.inf for byte in scale_bytes]
    stored = [e4m3(byte) for byte in values]
    if known is KVFormat.V41_FP4:
        stored = [e2m1(code) for byte in values for code in (byte & 15, byte >> 4)]
    group = len(stored) // len(scales)
    products = [float32(value * scales[position // group]) for position, value in enumerate(stored)]
    return [bfloat16_bits(product) for product in products] + list(struct.unpack(f"<{len(rope) // 2}H", rope))


def nearest(value: float, codes: list[tuple[float, int]]) -> int:
    """The code of the nearest value, ties to the even code."""
    return min(codes, key=lambda entry: (abs(entry[0] - value), entry[1] & 1))[1]


E4M3_CODES = [(e4m3(code), code) for code in range(0x7F)]
E2M1_CODES = [(e2m1(code), code) for code in range(8)]


def naive_scale(values: list[float], known: KVFormat, exact: bool) -> tuple[float, bytes]:
    """The scale of a group, as a number and as bytes."""
    amax = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    if known is KVFormat.V41_FP4:
        code = nearest(min(max(float32(amax / 6), 2.0**-9), 448.0), E4M3_CODES)
        return e4m3(code), bytes([0x7F if any(math.isnan(value) for value in values) else code])
    scale = max(float32(amax / 448), float32(1e-4))
    if not exact:
        mantissa, exponent = math.frexp(scale)
        scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
    if known in (KVFormat.V32, KVFormat.V32_NO_ROPE):
        return scale, struct.pack("<f", scale)
    return scale, bytes([int(math.log2(scale)) + 127])


def naive_quantized(row: list[float], known: KVFormat, exact: bool) -> tuple[bytes, bytes]:
    """The bytes of the quantised values and of the scales of a row."""
    layout = {
        KVFormat.V32: (512, 128),
        KVFormat.V32_NO_ROPE: (512, 128),
        KVFormat.MODEL1: (448, 64),
        KVFormat.V41: (512, 32),
        KVFormat.V41_FP4: (512, 16),
    }
    count, group = layout[known]
    codes, scales = [], b""
    table, sign_bit, largest = (E2M1_CODES, 8, 6.0) if known is KVFormat.V41_FP4 else (E4M3_CODES, 0x80, 448.0)
    for start in range(0, count, group):
        values = row[start : start + group]
        scale, written = naive_scale(values, known, exact)
        scales += written
        for value in values:
            if math.isnan(value):
                codes.append(7 if known is KVFormat.V41_FP4 else 0x7F)
            else:
                share = min(abs(float32(value / scale)), largest)
                codes.append(nearest(share, table) | (sign_bit if math.copysign(1, value) < 0 else 0))
    if known is KVFormat.V41_FP4:
        codes = [low | high << 4 for low, high in zip(codes[::2], codes[1::2], strict=True)]
    return bytes(codes), scales


def tricky_rows(d_qk: int) -> Tensor:
    """Rows of every size of number, with zeros of both signs, infinities and NaN."""
    generator = torch.Generator().manual_seed(d_qk)
    rows = torch.randn((9, d_qk), generator=generator)
    rows[1] *= 1e30
    rows[2] *= 1e-6
    rows[3] = 0.0
    rows[4] *= 10.0 ** torch.randint(-8, 3, (d_qk,), generator=generator)
    rows[5] = torch.arange(d_qk) % 449 - 224.0
    rows[6, ::3] = -0.0
    rows[7, 5], rows[7, 70], rows[7, 71], rows[7, 300] = math.inf, -math.inf, math.inf, 3.3895313892515355e38
    rows[8, 9], rows[8, 140] = math.nan, -math.nan
    return rows.to(torch.bfloat16)


def d_of(known: KVFormat) -> int:
    return 576 if known in (KVFormat.V32, KVFormat.BF16) else 512


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bits; any NaN equals any other."""
    same = (one.view(torch.int16) == other.view(torch.int16)) | (one.isnan() & other.isnan())
    return bool(same.all())


# ---- Reading.


@pytest.mark.parametrize("page", [1, 3, 64])
@pytest.mark.parametrize("known", BYTE_FORMATS)
def test_every_byte_is_read_as_the_table_says(backend: Target, known: KVFormat, page: int) -> None:
    """Random bytes, so every code and every scale, NaN among them."""
    cache = poisoned_cache(known, 192 // page, page)
    generator = torch.Generator().manual_seed(page)
    for block in range(cache.shape[0]):
        cache[block] = torch.randint(0, 256, cache[block].shape, dtype=torch.uint8, generator=generator)
    if known in (KVFormat.V32, KVFormat.V32_NO_ROPE):  # scales of a size that occurs
        scales = cache.view(torch.uint8)[..., 512:528]
        scales.copy_((torch.rand((*scales.shape[:3], 4), generator=generator) * 3).view(torch.uint8))
    values = dequantize_kv_cache(placed(cache, backend.device), known).cpu()
    assert values.shape == (192 // page, page, 1, d_of(known))
    assert values.dtype == torch.bfloat16
    for slot in range(0, 192, 17):
        wanted = torch.tensor(naive_row(cache, known, slot), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
        assert same_bits(values.view(192, -1)[slot], wanted), slot


@pytest.mark.parametrize("exponent", [0, 1, 2, 126, 127, 128, 253, 254, 255])
def test_ue8m0_scales(backend: Target, exponent: int) -> None:
    cache = torch.zeros((1, 256, 1, 528), dtype=torch.uint8)
    cache[0, :, 0, 0] = torch.arange(256)
    cache[..., 512] = exponent
    values = dequantize_kv_cache(cache.to(backend.device), "V41").cpu()
    wanted = torch.tensor([naive_row(cache, KVFormat.V41, slot)[0] for slot in range(256)], dtype=torch.int32)
    assert same_bits(values[0, :, 0, 0].contiguous(), wanted.to(torch.int16).view(torch.bfloat16))


def test_float32_scales_are_used_as_they_are(backend: Target) -> None:
    """Neither truncated to a power of two nor rounded to bfloat16."""
    cache = torch.zeros((1, 8, 1, 656), dtype=torch.uint8)
    cache[0, :, 0, 0] = 0x38  # 1.0
    scale = torch.tensor([1.00390625, 0.3, 1.5, 1.0001, 3e-5, 7.7, 1e-30, 1e30])
    cache[0, :, 0, 512:516] = scale.view(torch.uint8).view(8, 4)
    values = dequantize_kv_cache(cache.to(backend.device), KVFormat.V32).cpu()
    assert torch.equal(values[0, :, 0, 0], scale.to(torch.bfloat16))
    cache[0, :, 0, 0] = 0x3A  # 1.25: a product that is rounded once differs from one of a rounded scale
    values = dequantize_kv_cache(cache.to(backend.device), KVFormat.V32).cpu()
    assert torch.equal(values[0, :, 0, 0], (scale * 1.25).to(torch.bfloat16))


# ---- Writing.


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("known", BYTE_FORMATS)
def test_every_byte_is_written_as_the_table_says(backend: Target, known: KVFormat, exact: bool) -> None:
    if exact and known not in (KVFormat.V32, KVFormat.V32_NO_ROPE):
        pytest.skip("has no float32 scales")
    rows = tricky_rows(d_of(known))
    cache = quantize_kv_cache(rows.to(backend.device), known, 4, exact_scale=exact).cpu()
    for slot, row in enumerate(rows.float().tolist()):
        values, scales, rope = row_bytes(cache, known, slot)
        wanted_values, wanted_scales = naive_quantized(row, known, exact)
        assert scales == wanted_scales, slot
        assert values == wanted_values, slot
        assert rope == bytes(rows[slot, len(row) - len(rope) // 2 :].view(torch.uint8).tolist())


def rows_of_every_pattern(d_qk: int) -> Tensor:
    """Every bfloat16 once at least, in groups of any size of number and in groups of a similar one."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.arange(-(-(1 << 16) // d_qk) * d_qk)
    rows = torch.cat((patterns, patterns[torch.randperm(len(patterns), generator=generator)]))
    rows = rows.to(torch.int16).view(torch.bfloat16).view(-1, d_qk)
    return torch.cat((rows, (torch.randn((500, d_qk), generator=generator) * 9).to(torch.bfloat16)))


@pytest.mark.gpu
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("known", list(KVFormat))
def test_bits_of_the_reference(cuda: Target, known: KVFormat, exact: bool) -> None:
    """Of every value that there is; rows of any address and stride too."""
    if exact and known not in (KVFormat.V32, KVFormat.V32_NO_ROPE):
        pytest.skip("has no float32 scales")
    rows = rows_of_every_pattern(d_of(known))
    slots = torch.randperm(len(rows), generator=torch.Generator().manual_seed(2))
    blocks = -(-len(rows) // 64)
    wanted = poisoned_cache(known, blocks, 64, rows.shape[1])
    torch.ops.flash_mla.reference_append_kv_cache(rows, wanted, slots, known.value, exact)
    values = torch.ops.flash_mla.reference_dequantize_kv_cache(wanted, known.value)
    for offset, width in ((0, 0), (8, 16), (1, 3), (4, 4)):
        room = torch.full((len(rows), rows.shape[1] + width), math.nan, dtype=torch.bfloat16, device=cuda.device)
        here = room[:, offset : offset + rows.shape[1]]
        here.copy_(rows)
        every_other = torch.stack((slots, slots), 1).to(cuda.device)[:, 0]
        cache = poisoned_cache(known, blocks, 64, rows.shape[1], cuda.device)
        append_kv_cache(here, cache, every_other, known, exact_scale=exact)
        assert torch.equal(memory_of(cache).cpu(), memory_of(wanted))
        assert same_bits(dequantize_kv_cache(cache, known).cpu(), values)


@pytest.mark.gpu
@pytest.mark.parametrize(("offset", "d_qk"), [(0, 577), (2, 576), (8, 64), (0, 7)])
def test_bf16_caches_of_any_address(cuda: Target, offset: int, d_qk: int) -> None:
    room = torch.full((3, 64, 1, d_qk + offset), math.nan, dtype=torch.bfloat16, device=cuda.device)
    cache = room[..., offset:]
    rows = torch.randn((50, d_qk), device=cuda.device).to(torch.bfloat16)
    slots = torch.randperm(3 * 64, device=cuda.device)[:50]
    append_kv_cache(rows, cache, slots, "BF16")
    values = dequantize_kv_cache(cache, "BF16").view(-1, d_qk)
    assert torch.equal(values[slots], rows)
    assert int(values.isnan().sum()) == (3 * 64 - 50) * d_qk
    assert bool(room[..., :offset].isnan().all())


@pytest.mark.gpu
def test_an_address_that_no_kernel_takes(cuda: Target) -> None:
    memory = torch.full((1, 64, 1, 528 + 16), 0xFF, dtype=torch.uint8, device=cuda.device)
    with pytest.raises(flash_mla.UnsupportedError, match="cache must have an address that is a multiple of 16 bytes"):
        dequantize_kv_cache(memory[..., 8 : 8 + 528], "V41")
    reference.forget_warnings()
    problem = flash_mla.KVCacheProblem("cuda", 90, flash_mla.KVFormat.V41, 64)
    slowly = pytest.warns(RuntimeWarning, match="the reference backend serves CUDA tensors")
    with flash_mla.backends.use(None), nullcontext() if backends.TRITON.why_not(problem) is None else slowly:
        values = dequantize_kv_cache(memory[..., 8 : 8 + 528], "V41")
    assert bool(values.isnan().all())


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("known", BYTE_FORMATS)
def test_pages(backend: Target, known: KVFormat, page: int) -> None:
    """The layout of the result, what is not written, and that reading gives what was written."""
    tokens = 2 * page + page // 2 + 1
    rows = torch.randn((tokens, d_of(known)), generator=torch.Generator().manual_seed(page)).to(torch.bfloat16)
    cache = quantize_kv_cache(rows.to(backend.device), known, page)
    blocks = -(-tokens // page)
    size = {"V32": 656, "V32_NO_ROPE": 528, "MODEL1": 584, "V41": 528, "V41_FP4": 288}[known.value]
    assert cache.dtype == torch.uint8
    assert cache.shape == (blocks, page, 1, size)
    assert cache.stride(1) == size
    padded = {1: 1152, 2: 1728, 64: 37440, 256: 149760}
    if known is KVFormat.MODEL1:
        assert cache.stride(0) % 576 == 0
        assert cache.stride(0) == padded.get(page, cache.stride(0))
    else:
        assert cache.stride(0) == page * size
    values = dequantize_kv_cache(cache, known).cpu().view(blocks * page, -1)
    slot = tokens - 1
    wanted = torch.tensor(naive_row(cache.cpu(), known, slot), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert same_bits(values[slot], wanted)
    if known is not KVFormat.V41_FP4:
        error = (values[:tokens].float() - rows.float()).abs()
        assert bool((error <= rows.float().abs() / 16 + 0.01).all())
    assert not values[tokens:].any()
    again = quantize_kv_cache(values.to(backend.device), known, page)
    assert torch.equal(dequantize_kv_cache(again, known).cpu().view(blocks * page, -1), values)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("page", [1, 2, 64])
@pytest.mark.parametrize("known", list(KVFormat))
def test_append_writes_its_slots_alone(backend: Target, known: KVFormat, page: int, slot_dtype: torch.dtype) -> None:
    """-1 and whatever is no slot is skipped; every other byte, padding included, stays."""
    blocks = 6
    slots = torch.randperm(blocks * page, generator=torch.Generator().manual_seed(1))[: 4 * page]
    d_qk = d_of(known)
    rows = torch.randn((len(slots) + 4, d_qk), generator=torch.Generator().manual_seed(2)).to(torch.bfloat16)
    mapping = torch.cat((torch.tensor([-1, -5]), slots, torch.tensor([blocks * page, 2**31 - 1]))).to(slot_dtype)
    cache = poisoned_cache(known, blocks, page, d_qk, backend.device)
    assert append_kv_cache(rows.to(backend.device), cache, mapping.to(backend.device), known) is None
    fresh = quantize_kv_cache(rows[2:-2].to(backend.device), known, page)
    written = dequantize_kv_cache(cache, known).view(blocks * page, d_qk).cpu()
    wanted = dequantize_kv_cache(fresh, known).view(-1, d_qk)[: len(slots)].cpu()
    assert torch.equal(written[slots], wanted)
    rest = torch.ones(blocks * page, dtype=torch.bool)
    rest[slots] = False
    untouched = poisoned_cache(known, blocks, page, d_qk).view(torch.uint8)
    touched = placed(cache.view(torch.uint8), "cpu")
    assert touched.stride() == untouched.stride()
    if known is KVFormat.MODEL1:
        for slot in range(blocks * page):
            parts = [row_bytes(tensor, known, slot) for tensor in (touched, untouched)]
            assert (parts[0] == parts[1]) == bool(rest[slot])
        stride = touched.stride(0)
        storage = memory_of(touched).view(blocks, stride)
        assert bool((storage[:, 584 * page :] == 0xFF).all())
        pads = storage[:, 576 * page : 584 * page].reshape(blocks * page, 8)[:, 7]
        assert bool((pads == torch.where(rest, 0xFF, 0)).all())
    else:
        flat = touched.flatten(0, 1)[rest]
        assert torch.equal(flat, untouched.flatten(0, 1)[rest])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.uint8])
@pytest.mark.parametrize("known", BYTE_FORMATS)
def test_what_a_cache_may_be_declared_as(backend: Target, known: KVFormat, dtype: torch.dtype) -> None:
    rows = torch.randn((70, d_of(known))).to(torch.bfloat16).to(backend.device)
    plain = quantize_kv_cache(rows, known, 64)
    cache = torch.zeros_like(plain).view(dtype)
    slots = torch.arange(70, device=backend.device)
    append_kv_cache(rows, cache, slots, known)
    assert torch.equal(dequantize_kv_cache(cache, known), dequantize_kv_cache(plain, known))


@pytest.mark.parametrize("known", BYTE_FORMATS)
def test_pools_in_one_buffer(backend: Target, known: KVFormat) -> None:
    """Pages that alternate with those of another pool; the other pool is not touched."""
    page, blocks = 16, 4
    stride = known.layout.page_stride(page)
    size = known.layout.bytes_per_token
    buffer = torch.full((blocks, 2, stride + 64), 0xFF, dtype=torch.uint8, device=backend.device)
    start = buffer[0, 1].storage_offset() + 32
    cache = buffer.as_strided((blocks, page, 1, size), (buffer.stride(0), size, size, 1), start)
    rows = torch.randn((blocks * page, d_of(known))).to(torch.bfloat16).to(backend.device)
    append_kv_cache(rows, cache, torch.arange(blocks * page, device=backend.device), known)
    plain = quantize_kv_cache(rows, known, page)
    assert torch.equal(dequantize_kv_cache(cache, known), dequantize_kv_cache(plain, known))
    assert bool((buffer[:, 0] == 0xFF).all())
    assert bool((buffer[:, 1, :32] == 0xFF).all())
    assert bool((buffer[:, 1, 32 + size * page :] == 0xFF).all())


def test_page_size_one_view_of_a_wider_buffer(backend: Target) -> None:
    """LightLLM's V3.2 cache."""
    rows = torch.randn((20, 576)).to(torch.bfloat16).to(backend.device)
    buffer = torch.full((20, 2, 1, 704), 0xFF, dtype=torch.uint8, device=backend.device)
    view = buffer[:, 1].as_strided((20, 1, 1, 656), (2 * 704, 656, 656, 1), 704 + 16)
    append_kv_cache(rows, view, torch.arange(20, dtype=torch.int32, device=backend.device), "V32")
    assert torch.equal(dequantize_kv_cache(view, "V32"), dequantize_kv_cache(quantize_kv_cache(rows, "V32", 1), "V32"))
    assert bool((buffer[:, 0] == 0xFF).all())


def test_bf16_caches(backend: Target) -> None:
    rows = torch.randn((70, 576)).to(torch.bfloat16).to(backend.device)
    cache = quantize_kv_cache(rows, KVFormat.BF16, 64)
    assert cache.shape == (2, 64, 1, 576)
    assert torch.equal(cache.view(128, 576)[:70], rows)
    assert torch.equal(dequantize_kv_cache(cache, "BF16"), cache)


def test_strided_rows(backend: Target) -> None:
    room = torch.full((9, 700), math.nan, dtype=torch.bfloat16, device=backend.device)
    room[:, 64:640] = torch.randn((9, 576)).to(torch.bfloat16)
    rows = room[:, 64:640]
    assert torch.equal(quantize_kv_cache(rows, "V32", 4), quantize_kv_cache(rows.contiguous(), "V32", 4))


def test_no_rows(backend: Target) -> None:
    rows = torch.empty((0, 576), dtype=torch.bfloat16, device=backend.device)
    assert quantize_kv_cache(rows, "V32", 64).shape == (0, 64, 1, 656)
    cache = poisoned_cache("V32", 2, 64, device=backend.device)
    append_kv_cache(rows, cache, torch.empty(0, dtype=torch.int64, device=backend.device), "V32")
    assert bool((cache == 0xFF).all())


def test_offsets_beyond_32_bits(backend: Target) -> None:
    """A cache of 4.6 GB, of which a few pages are ever touched."""
    num_blocks, page = 110_000, 64
    cache = torch.empty((num_blocks, page, 1, 656), dtype=torch.uint8, device=backend.device)
    rows = torch.randn((3, 576)).to(torch.bfloat16).to(backend.device)
    slots = torch.tensor([num_blocks * page - 1, 3_273_604, 6_547_208], device=backend.device)
    append_kv_cache(rows, cache, slots, "V32")
    wanted = dequantize_kv_cache(quantize_kv_cache(rows, "V32", 1), "V32")
    for slot, row in zip(slots.tolist(), wanted, strict=True):
        found = dequantize_kv_cache(cache[slot // page, slot % page].view(1, 1, 1, 656), "V32")
        assert torch.equal(found[0], row)


def test_names_of_formats() -> None:
    assert kv_format.parse("V4") is KVFormat.MODEL1
    assert kv_format.parse(KVFormat.V41) is KVFormat.V41
    for known in BYTE_FORMATS:
        layout = known.layout
        assert layout.d_qk == layout.quantised + layout.rope
        assert layout.value_bytes + layout.scale_bytes + 2 * layout.rope <= layout.bytes_per_token
        assert known.d_qk_of(poisoned_cache(known, 1, 1)) == layout.d_qk


def test_opcheck(backend: Target) -> None:
    rows = torch.randn((5, 512), device=backend.device).to(torch.bfloat16)
    cache = quantize_kv_cache(rows, "V41", 4)
    slots = torch.tensor([1, -1, 7, 0, 3], device=backend.device)
    for prefix in ("", "reference_"):
        append = getattr(torch.ops.flash_mla, f"{prefix}append_kv_cache").default
        torch.library.opcheck(append, (rows, cache, slots, "V41", False))
        read = getattr(torch.ops.flash_mla, f"{prefix}dequantize_kv_cache").default
        torch.library.opcheck(read, (cache, "V41"))


@pytest.mark.parametrize("page", [1, 64])
@pytest.mark.parametrize("known", ["V32", "MODEL1"])
def test_compiled_append(backend: Target, known: str, page: int) -> None:
    """Written in place, padded pages included."""
    rows = torch.randn((4, d_of(KVFormat(known)))).to(torch.bfloat16).to(backend.device)
    slots = torch.tensor([3, -1, 65, 0], device=backend.device)
    wanted, cache = (poisoned_cache(known, 128 // page, page, device=backend.device) for _ in range(2))
    append_kv_cache(rows * 2, wanted, slots, known)

    def step(rows: Tensor, cache: Tensor, slots: Tensor) -> Tensor:
        append_kv_cache(rows * 2, cache, slots, known)
        return rows + 1

    torch._dynamo.reset()
    with flash_mla.backends.use(None):
        compiler = "inductor" if backend.is_cuda else "aot_eager"
        torch.compile(step, fullgraph=True, backend=compiler)(rows, cache, slots)
    assert torch.equal(memory_of(cache), memory_of(wanted))


# ---- Errors.

ROWS = torch.zeros((4, 512), dtype=torch.bfloat16)
CACHE = torch.zeros((2, 64, 1, 584), dtype=torch.uint8)
SLOTS = torch.arange(4)

WRONG_APPEND = {
    "format": ({"format": "V5"}, ValueError, r"format: wanted V32 or V32_NO_ROPE or MODEL1 or V4 .*, got 'V5'"),
    "format type": ({"format": 3}, TypeError, "format: wanted a KVFormat or its name, got int"),
    "kv dtype": ({"kv": ROWS.float()}, TypeError, "kv: wanted torch.bfloat16, got torch.float32"),
    "kv width": ({"kv": ROWS[:, :511]}, ValueError, r"kv: wanted d_qk = 512 values per row \(MODEL1\), got 511"),
    "kv dims": ({"kv": ROWS[0]}, ValueError, r"kv: wanted 2 dimensions \[tokens, d_qk\], got shape \[512\]"),
    "kv stride": ({"kv": ROWS.t().contiguous().t()}, ValueError, "kv: wanted a contiguous last dimension"),
    "cache dtype": ({"cache": CACHE.short()}, TypeError, "cache: wanted torch.float8_e4m3fn or torch.int8 or .*, got"),
    "cache dims": ({"cache": CACHE[0]}, ValueError, "cache: wanted 4 dimensions"),
    "cache bytes": (
        {"cache": torch.zeros((2, 64, 1, 656), dtype=torch.uint8)},
        ValueError,
        r"cache: wanted 584 bytes per token \(MODEL1\), got 656",
    ),
    "cache heads": ({"cache": CACHE.expand(2, 64, 2, 584)}, ValueError, r"cache: wanted one KV head \(h_kv = 1\), got"),
    "cache rows apart": (
        {"cache": torch.zeros((2, 64, 1, 592), dtype=torch.uint8)[..., :584]},
        ValueError,
        r"cache: wanted stride\(1\) = 584 .*, got 592",
    ),
    "cache page stride": (
        {"cache": torch.zeros(2000, dtype=torch.uint8).as_strided((2, 1, 1, 584), (584, 584, 584, 1))},
        ValueError,
        r"cache: wanted stride\(0\) that is a multiple of 16 bytes, got 584",
    ),
    "cache empty": ({"cache": CACHE[:0]}, ValueError, "cache: wanted num_blocks and page_block_size of at least 1"),
    "slots dtype": ({"slot_mapping": SLOTS.short()}, TypeError, "slot_mapping: wanted torch.int32 or torch.int64, got"),
    "slots count": (
        {"slot_mapping": SLOTS[:3]},
        ValueError,
        r"slot_mapping: wanted shape \[tokens\] = \[4\], got \[3\]",
    ),
    "slots None": ({"slot_mapping": None}, TypeError, r"slot_mapping: wanted a tensor \[tokens\], got None"),
    "exact": ({"exact_scale": True}, ValueError, "exact_scale: wanted False for MODEL1 .*, got True"),
    "exact type": ({"exact_scale": 1}, TypeError, "exact_scale: wanted a bool, got int"),
}


@pytest.mark.parametrize("case", WRONG_APPEND)
def test_wrong_arguments_of_append(backend: Target, case: str) -> None:
    change, error, text = WRONG_APPEND[case]
    call = {"kv": ROWS, "cache": CACHE.clone(), "slot_mapping": SLOTS, "format": "MODEL1", **change}
    with pytest.raises(error, match=text):
        append_kv_cache(**{k: placed(v, backend.device) if isinstance(v, Tensor) else v for k, v in call.items()})


def test_wrong_arguments_of_the_others(backend: Target) -> None:
    rows, cache = ROWS.to(backend.device), CACHE.to(backend.device)
    wide = torch.zeros((4, 660), dtype=torch.uint8, device=backend.device)
    with pytest.raises(ValueError, match="page: wanted at least 1, got 0"):
        quantize_kv_cache(rows, "MODEL1", 0)
    with pytest.raises(TypeError, match="page: wanted an int, got float"):
        quantize_kv_cache(rows, "MODEL1", 64.0)
    with pytest.raises(ValueError, match=r"kv: wanted d_qk = 576 values per row \(V32\), got 512"):
        quantize_kv_cache(rows, "V32", 64)
    with pytest.raises(ValueError, match=r"cache: wanted 528 bytes per token \(V41\), got 584"):
        dequantize_kv_cache(cache, "V41")
    with pytest.raises(TypeError, match=r"cache: wanted torch.bfloat16, got torch.uint8"):
        dequantize_kv_cache(cache, "BF16")
    with pytest.raises(ValueError, match=r"cache: wanted stride\(0\) that is a multiple of 16 bytes, got 660"):
        dequantize_kv_cache(wide[:, None, None, :656], "V32")


def test_the_cuda_backend_says_why_not() -> None:
    if flash_mla.backends.cuda_missing is not None:
        pytest.skip(flash_mla.backends.cuda_missing)
    with flash_mla.backends.use("cuda"), pytest.raises(flash_mla.UnsupportedError, match="kv cache: no backend takes"):
        dequantize_kv_cache(CACHE, "MODEL1")
    reason = flash_mla.why_not("kv_cache", cache=CACHE, format="V4")
    assert reason is not None
    assert reason.startswith("cuda: the tensors are on cpu; triton: ")
