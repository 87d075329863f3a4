"""Cache formats in Triton: from the bytes of tokens to bfloat16 keys, in registers.

Value = stored value * scale, computed in float32 and rounded once to bfloat16. FP8 and FP4 codes become float16 bit
patterns by shifts and masks: float16 has more exponents, so every code, subnormals included, has an exact one, and the
conversion of float16 to float32 exists on every GPU. Where the GPU converts FP8 itself (compute capability 8.9 and
later), that is used instead; both give the same bits.
"""

from enum import IntEnum
from typing import Any

import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton.language import D_ROPE, D_V, jit, rounded


class Format(IntEnum):
    """How the tokens of a cache are stored. Kernels compare the order too: what is not quantised comes first."""

    NONE = 0
    """There is no such cache."""
    BF16_576 = 1
    BF16_512 = 2
    V32 = 3
    V32_NO_ROPE = 4
    MODEL1 = 5
    V41 = 6
    V41_FP4 = 7
    E4M3_576 = 8
    """e4m3 values that all have one scale, which is left to whoever multiplies by them."""
    E4M3_512 = 9

    @property
    def in_flight(self) -> int:
        """Bytes of shared memory that a key takes while it is loaded, or 0 for keys that are multiplied from there."""
        return _IN_FLIGHT.get(self.name, 0)

    @staticmethod
    def of(kv_format: str | None, d_qk: int) -> "Format":
        """From the name of a `KVFormat`, or None for e4m3 values with one scale."""
        name = "E4M3" if kv_format is None else kv_format
        return Format[f"{name}_{d_qk}" if name in ("BF16", "E4M3") else name]


_IN_FLIGHT = {
    "V32": 656,
    "V32_NO_ROPE": 528,
    "MODEL1": 648,
    "V41": 528,
    "V41_FP4": 288,
    "E4M3_576": 576,
    "E4M3_512": 512,
}


def pages_of(cache: Tensor, format: Format | None) -> tuple[int, int, int]:
    """Rows of a page, and the strides of pages and rows. Evenly spaced rows are pages of one: nothing to divide."""
    page, (stride_page, stride_row) = cache.shape[1], cache.stride()[:2]
    if page > 1 and stride_page == page * stride_row and format is not Format.MODEL1:
        return 1, stride_row, stride_row
    return page, stride_page, stride_row


NONE = tl.constexpr(int(Format.NONE))
BF16_576 = tl.constexpr(int(Format.BF16_576))
BF16_512 = tl.constexpr(int(Format.BF16_512))
V32 = tl.constexpr(int(Format.V32))
V32_NO_ROPE = tl.constexpr(int(Format.V32_NO_ROPE))
MODEL1 = tl.constexpr(int(Format.MODEL1))
V41 = tl.constexpr(int(Format.V41))
V41_FP4 = tl.constexpr(int(Format.V41_FP4))
E4M3_576 = tl.constexpr(int(Format.E4M3_576))

# MODEL1: values before the RoPE part, bytes of a token's values, bytes of its scales.
MODEL1_NOPE = tl.constexpr(448)
MODEL1_TOKEN = tl.constexpr(576)
MODEL1_SCALES = tl.constexpr(8)


@jit
def e4m3_to_float32(code: tl.tensor, HARDWARE: tl.constexpr) -> Any:
    """The value of e4m3 codes (uint8). 0x7f and 0xff are NaN; there is no infinity."""
    if HARDWARE:
        value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    else:
        # e4m3 has bias 7 and float16 bias 15: the same fields stand for 2^-8 of the value.
        wide = code.to(tl.uint16)
        half = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value)
    return value


@jit
def e2m1_to_float32(code: tl.tensor) -> Any:
    """The value of e2m1 codes (uint8, 0 to 15): 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    # e2m1 has bias 1 and float16 bias 15: the same fields stand for 2^-14 of the value.
    wide = code.to(tl.uint16)
    half = ((wide & 0x8) << 12) | ((wide & 0x7) << 9)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 16384.0


@jit
def ue8m0_to_float32(code: tl.tensor) -> Any:
    """`2^(code - 127)`; the smallest is a subnormal number of float32."""
    wide = code.to(tl.uint32)
    return tl.where(wide == 0, 0x00400000, wide << 23).to(tl.float32, bitcast=True)


@jit
def scaled(values: tl.tensor, scales: tl.tensor, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr) -> Any:
    """float32 values `[BLOCK_N, 512]` times scales `[BLOCK_N, GROUPS]`, each for 512 / GROUPS of them; bfloat16."""
    grouped = tl.reshape(values, [BLOCK_N, GROUPS, D_V // GROUPS]) * scales[:, :, None]
    return rounded(tl.reshape(grouped, [BLOCK_N, D_V]), tl.bfloat16)


@jit
def token_bytes(
    first: tl.tensor,
    in_page: tl.tensor,
    stride_token: tl.tensor,
    page: tl.tensor,
    FORMAT: tl.constexpr,
) -> Any:
    """Addresses of the tokens' values, and of their scales where those lie elsewhere.

    `first` points to the first byte of the tokens' pages, `in_page` (32 bits) is their place there.
    """
    if FORMAT == MODEL1:
        tokens = first + in_page * MODEL1_TOKEN
        scales = first + (page * MODEL1_TOKEN + in_page * MODEL1_SCALES)
    else:
        tokens = first + in_page.to(tl.int64) * stride_token
        scales = tokens
    return tokens, scales


@jit
def load_bytes(first: tl.tensor, live: tl.tensor, BLOCK_N: tl.constexpr, BYTES: tl.constexpr) -> Any:
    """uint8 `[BLOCK_N, BYTES]`, by words of four (`live` is a mask of these): narrower loads the compiler does not
    always make ahead of their use.
    """
    words = first.to(tl.pointer_type(tl.uint32))[:, None] + tl.arange(0, BYTES // 4)[None, :]
    parts = tl.load(words, mask=live, other=0)[:, :, None] >> (8 * tl.arange(0, 4))[None, None, :]
    return tl.reshape(parts.to(tl.uint8), [BLOCK_N, BYTES])


@jit
def bytes_of(words: tl.tensor) -> Any:
    """uint8 `[rows, chunks, words, 2, 2]`: the bytes of uint32 words, each in the thread that has its word."""
    even = tl.join(words.to(tl.uint8), (words >> 16).to(tl.uint8))
    odd = tl.join((words >> 8).to(tl.uint8), (words >> 24).to(tl.uint8))
    return tl.join(even, odd)


@jit
def pairs_of(words: tl.tensor) -> Any:
    """bfloat16 `[rows, chunks, 2 * words]`: the halves of uint32 words."""
    low = (words & 0xFFFF).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    high = (words >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.interleave(low, high)


@jit
def load_chunks(
    tokens: tl.tensor,
    scale_bytes: tl.tensor,
    valid: tl.tensor,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """`load_tokens` of quantised formats for warpgroups, which read keys from shared memory: all words of a token are
    loaded by few threads, one row each, so that neither scales nor MODEL1's RoPE part move between threads, and rows
    are written to shared memory without conflicts. MODEL1's RoPE part comes as the end of V.
    """
    CHUNKS: tl.constexpr = 8
    WORDS: tl.constexpr = 8 if FORMAT == V41_FP4 else 16
    VALUES: tl.constexpr = CHUNKS * WORDS
    ROPE: tl.constexpr = MODEL1_NOPE // 4 if FORMAT == MODEL1 else VALUES + 4 if FORMAT == V32 else 0
    chunk = tl.arange(0, CHUNKS)[None, :, None]
    word = tl.arange(0, 16)[None, None, :]
    live = valid[:, None, None]
    words = tokens.to(tl.pointer_type(tl.uint32))[:, None, None]
    quantised = live & (chunk < MODEL1_NOPE // 64) if FORMAT == MODEL1 else live
    codes = bytes_of(tl.load(words + chunk * WORDS + tl.arange(0, WORDS)[None, None, :], mask=quantised, other=0))
    if FORMAT == V41_FP4:
        pair = tl.reshape(codes, [BLOCK_N, CHUNKS, 4 * WORDS])
        value = tl.interleave(e2m1_to_float32(pair & 0xF), e2m1_to_float32(pair >> 4))
    else:
        value = e4m3_to_float32(codes, HARDWARE)
    if FORMAT < E4M3_576:
        # Loads of so few elements have no layout of their own: they take that of the values.
        GROUPS: tl.constexpr = 4 if FORMAT <= V32_NO_ROPE else 8 if FORMAT == MODEL1 else 16 if FORMAT == V41 else 32
        BITS: tl.constexpr = 32 if FORMAT <= V32_NO_ROPE else 8
        PER_LOAD: tl.constexpr = 64 // BITS
        at = (scale_bytes if FORMAT == MODEL1 else tokens + 4 * VALUES).to(tl.pointer_type(tl.uint64))
        stored = tl.load(at[:, None, None] + tl.arange(0, GROUPS // PER_LOAD)[None, :, None], mask=live, other=0)
        stored = tl.reshape(stored >> (BITS * tl.arange(0, PER_LOAD))[None, None, :], [BLOCK_N, GROUPS, 1])
        if FORMAT <= V32_NO_ROPE:
            scale = stored.to(tl.uint32).to(tl.float32, bitcast=True)
        elif FORMAT == V41_FP4:
            scale = e4m3_to_float32(stored.to(tl.uint8), HARDWARE)
        else:
            scale = ue8m0_to_float32(stored.to(tl.uint8))
        value = tl.reshape(value, [BLOCK_N, GROUPS, D_V // GROUPS]) * scale
    k = tl.reshape(rounded(value, tl.bfloat16), [BLOCK_N, D_V])
    k_rope = k
    if FORMAT == E4M3_576:
        code = bytes_of(tl.load(words + VALUES + word, mask=live, other=0))
        k_rope = tl.reshape(rounded(e4m3_to_float32(code, HARDWARE), tl.bfloat16), [BLOCK_N, D_ROPE])
    elif ROPE > 0:
        pairs = pairs_of(tl.load(words + ROPE + 16 * tl.arange(0, 2)[None, :, None] + word, mask=live, other=0))
        k_rope = tl.reshape(pairs, [BLOCK_N, D_ROPE])
    if FORMAT == MODEL1:
        chunks = tl.reshape(k, [BLOCK_N, CHUNKS, D_V // CHUNKS])
        k = tl.reshape(tl.where(chunk < MODEL1_NOPE // 64, chunks, k_rope[:, None, :]), [BLOCK_N, D_V])
    return k, k_rope


@jit
def load_tokens(
    first: tl.tensor,
    in_page: tl.tensor,
    valid: tl.tensor,
    stride_token: tl.tensor,
    page: tl.tensor,
    FORMAT: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKED: tl.constexpr,
) -> Any:
    """Keys `[BLOCK_N]` at `in_page` of the pages that begin at `first`: V's part bfloat16 `[BLOCK_N, 512]` and the RoPE
    part behind it, where the format has one. Keys that are not `valid` are not read, and are 0. MODEL1's RoPE part is
    the end of V: with CHUNKED it stands there, else it comes by itself, and the end is 0.

    `first` points to bfloat16 for BF16 formats and to bytes for the others; the stride counts elements of that.
    CHUNKED: quantised formats by `load_chunks`. Perf: 240 us where it was 362 (H100, MODEL1, 64 heads, 256 requests),
    but 164 where it was 140 with tiles of 16 rows (V32, 16 heads, 128 requests), of which many warps read all keys.
    """
    tokens, scale_bytes = token_bytes(first, in_page, stride_token, page, FORMAT)
    column = tl.arange(0, D_V)[None, :]
    rope_column = tl.arange(0, D_ROPE)[None, :]
    live = valid[:, None]
    if FORMAT <= BF16_512:
        k = tl.load(tokens[:, None] + column, mask=live, other=0.0)
        k_rope = k
        if FORMAT == BF16_576:
            k_rope = tl.load(tokens[:, None] + D_V + rope_column, mask=live, other=0.0)
    elif CHUNKED:
        k, k_rope = load_chunks(tokens, scale_bytes, valid, FORMAT, HARDWARE, BLOCK_N)
    elif FORMAT <= V32_NO_ROPE:
        code = load_bytes(tokens, live, BLOCK_N, D_V)
        at = (tokens + D_V).to(tl.pointer_type(tl.float32))[:, None] + tl.arange(0, 4)[None, :]
        k = scaled(e4m3_to_float32(code, HARDWARE), tl.load(at, mask=live, other=0.0), BLOCK_N, 4)
        k_rope = k
        if FORMAT == V32:
            rope = (tokens + D_V + 16).to(tl.pointer_type(tl.bfloat16))
            k_rope = tl.load(rope[:, None] + rope_column, mask=live, other=0.0)
    elif FORMAT == MODEL1:
        is_nope = tl.arange(0, D_V // 4)[None, :] < MODEL1_NOPE // 4
        code = load_bytes(tokens, live & is_nope, BLOCK_N, D_V)
        scale = ue8m0_to_float32(load_bytes(scale_bytes, live, BLOCK_N, 8))
        scale = tl.where(tl.arange(0, 8)[None, :] == 7, 1.0, scale)
        k = scaled(e4m3_to_float32(code, HARDWARE), scale, BLOCK_N, 8)
        rope = (tokens + MODEL1_NOPE).to(tl.pointer_type(tl.bfloat16))
        k_rope = tl.load(rope[:, None] + rope_column, mask=live, other=0.0)
    elif FORMAT == V41:
        code = load_bytes(tokens, live, BLOCK_N, D_V)
        scale = load_bytes(tokens + D_V, live, BLOCK_N, 16)
        k = scaled(e4m3_to_float32(code, HARDWARE), ue8m0_to_float32(scale), BLOCK_N, 16)
        k_rope = k
    elif FORMAT == V41_FP4:
        pair = load_bytes(tokens, live, BLOCK_N, 256)
        value = tl.interleave(e2m1_to_float32(pair & 0xF), e2m1_to_float32(pair >> 4))
        scale = load_bytes(tokens + 256, live, BLOCK_N, 32)
        k = scaled(value, e4m3_to_float32(scale, HARDWARE), BLOCK_N, 32)
        k_rope = k
    else:
        tl.static_assert(FORMAT >= E4M3_576)
        code = load_bytes(tokens, live, BLOCK_N, D_V)
        k = e4m3_to_float32(code, HARDWARE).to(tl.bfloat16)  # exact
        k_rope = k
        if FORMAT == E4M3_576:
            code = tl.load(tokens[:, None] + D_V + rope_column, mask=live, other=0)
            k_rope = e4m3_to_float32(code, HARDWARE).to(tl.bfloat16)
    return k, k_rope
