"""What all kernels share: the typed decorator, constants, and the softmax over one tile of keys."""

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from flash_mla.backends.triton.config import interpreting


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, under a type that a checker accepts where Triton is not installed."""
    return triton.jit(function)


def jit_for_any_value(*names: str) -> Callable[[Callable[..., Any]], Any]:
    """`triton.jit` that compiles no special case for the values 1 and multiples of 16 of these arguments.

    Sizes of the batch change from call to call; a compilation for each kind of value would stall a server.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        return triton.jit(function, do_not_specialize=list(names))

    return decorate


INTERPRETED = tl.constexpr(interpreting())

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

SCHEDULE_BLOCK = tl.constexpr(64)
"""Keys per block of a schedule."""

LEAST_CUT = tl.constexpr(8)
"""The fewest blocks of a piece in the batch-invariant mode."""

NO_END = tl.constexpr(2**31 - 1)

WHOLE, NOTHING = tl.constexpr(-1), tl.constexpr(-2)
"""In place of the index of a partial result: the piece is the whole request; there is no piece."""

D_V = tl.constexpr(512)
"""V is the first so many values of a key."""

D_ROPE = tl.constexpr(64)
"""Values of a key behind V, where d_qk is 576; of MODEL1, the last ones of V."""


@jit
def wide(number: tl.tensor) -> Any:
    """`number` with 64 bits. (The variable of a loop is a plain int under the interpreter, and has no `.to`.)"""
    return tl.full((), 0, tl.int64) + number


@jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> Any:
    """`a @ b + acc` in float32. (The interpreter multiplies the bit patterns of bfloat16 as if they were integers.)"""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc)


@jit
def rounded(x: tl.tensor, DTYPE: tl.constexpr) -> Any:
    """float32 `x` in another float type, rounded to nearest even. (Not so by the interpreter, for bfloat16.)"""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        up = bits + (0x7FFF + ((bits >> 16) & 1))
        high = tl.where(x == x, up, bits | 0x400000) >> 16
        return high.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(DTYPE)


@jit
def widened(x: tl.tensor) -> Any:
    """bfloat16 `x` in float32. (The interpreter breaks subnormals.)"""
    if INTERPRETED:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@jit
def ceil_div(a: tl.tensor, b: tl.tensor) -> Any:
    """`a / b` rounded up, for numbers that are not negative."""
    return (a + b - 1) // b


@jit
def piece_of(
    schedule: tl.tensor,
    part: tl.tensor,
    num_parts: tl.tensor,
    request: tl.tensor,
    begin_request: tl.tensor,
    end_request: tl.tensor,
) -> Any:
    """What `part` does of `request`: first block, end block (exclusive), and the index of its partial result, or WHOLE.

    The schedule may have been made for other lengths (a captured graph that is replayed). Cuts between parts are taken
    from the schedule; the part that holds a request's last piece goes on to the request's present end. So every key is
    seen once, whatever the lengths were.
    """
    begin_block = tl.load(schedule + part * 8 + 2)
    end_block = tl.load(schedule + part * 8 + 3)
    next_request = tl.load(schedule + (part + 1) * 8, mask=part + 1 < num_parts, other=-1)
    first = request == begin_request
    continues = (request == end_request) & (next_request == request)
    begin = tl.where(first, begin_block, 0)
    end = tl.where(continues, end_block, NO_END)
    whole = (begin == 0) & (continues == 0)
    partial = tl.where(whole, WHOLE, 2 * part + tl.where(first, 0, 1))
    return begin, end, partial


@jit
def fixed_cut_blocks(num_blocks: tl.tensor, max_cuts: tl.tensor) -> Any:
    """Blocks per piece in the batch-invariant mode: cuts that depend on the request alone.

    Up to `max_cuts` pieces of equal length, none shorter than LEAST_CUT blocks.
    """
    return tl.maximum(ceil_div(num_blocks, max_cuts), LEAST_CUT)


@jit
def online_softmax(scores: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor) -> Any:
    """One step of the online softmax in base 2, over scores `[rows, keys]` that are -inf where masked.

    Returns the probabilities relative to the new maximum, the factor for what was accumulated before, and the new
    maximum and sum.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no key yet: -inf - -inf is NaN.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - origin[:, None])
    rescale = tl.exp2(row_max - origin)
    return p, rescale, new_max, row_sum * rescale + tl.sum(p, 1)


@jit
def scores_of(
    q_v: tl.tensor,
    q_rope: tl.tensor,
    k: tl.tensor,
    k_rope: tl.tensor,
    scale_log2: tl.tensor,
    ROPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> Any:
    """Scores `[BLOCK_M, BLOCK_N]` in base 2. The sum of two products, of which none goes on with the other's result:
    `softmax_step` says why.
    """
    scores = dot(q_v, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
    if ROPE:
        scores += dot(q_rope, tl.trans(k_rope), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)) * scale_log2
    return scores


@jit
def softmax_step(
    scores: tl.tensor, row_max: tl.tensor, row_sum: tl.tensor, always: tl.tensor, BLOCK_M: tl.constexpr
) -> Any:
    """`online_softmax`, under a condition that is `always` true where BLOCK_M is 64.

    The compiler deals out the rows of a product to all warps where its result enters another product. With 64 rows
    there are too few for two warpgroups: each computes all scores. What passes through a condition it does not follow,
    and cuts the scores by keys. Perf: 542 us where it was 592 (H200, 128 heads, 128 requests of 4k keys).
    """
    p = scores
    rescale = row_max
    if BLOCK_M == 64:
        if always:
            p, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum)
    else:
        p, rescale, row_max, row_sum = online_softmax(scores, row_max, row_sum)
    return p, rescale, row_max, row_sum


@jit
def final_factor(row_max: tl.tensor, row_sum: tl.tensor, sink: tl.tensor, HAS_SINK: tl.constexpr) -> Any:
    """What turns the accumulator of each row into its output: 0 for a row without keys."""
    total = row_sum
    if HAS_SINK:
        # A row without keys has maximum -inf, which must not meet a sink of -inf.
        total += tl.exp2(sink * LOG2E - tl.where(row_max == float("-inf"), 0.0, row_max))
    return tl.where(row_sum == 0.0, 0.0, 1.0 / tl.where(row_sum == 0.0, 1.0, total))


@jit
def lse_base_2(row_max: tl.tensor, row_sum: tl.tensor, EMPTY: tl.constexpr) -> Any:
    """Base-2 logarithm of the sum of exponentials; EMPTY for a row without keys."""
    return tl.where(row_sum == 0.0, EMPTY, row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)))


@jit
def times(acc: tl.tensor, factor: tl.tensor) -> Any:
    """The accumulator times a factor for each row; 0 where that is 0, whatever was accumulated.

    The accumulator of a row without keys may be NaN, where the keys of other rows are.
    """
    return tl.where(factor[:, None] == 0.0, 0.0, acc * factor[:, None])


@jit
def store_columns(
    rows: tl.tensor, acc: tl.tensor, acc_rope: tl.tensor, factor: tl.tensor, exists: tl.tensor, TAIL: tl.constexpr
) -> None:
    """Write `[rows, 512]` times a factor for each row; with TAIL the last 64 columns come from `acc_rope`."""
    column = tl.arange(0, D_V)[None, :]
    stored = exists[:, None]
    if TAIL:
        tail = rows[:, None] + D_V - D_ROPE + tl.arange(0, D_ROPE)[None, :]
        tl.store(tail, rounded(times(acc_rope, factor), rows.dtype.element_ty), mask=stored)
        stored &= column < D_V - D_ROPE
    tl.store(rows[:, None] + column, rounded(times(acc, factor), rows.dtype.element_ty), mask=stored)


@jit
def store_result(
    out_rows: tl.tensor,
    lse_rows: tl.tensor,
    acc: tl.tensor,
    acc_rope: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    sink: tl.tensor,
    exists: tl.tensor,
    HAS_SINK: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Write the outputs `[rows, 512]` and logarithms of rows whose keys have all been seen."""
    store_columns(out_rows, acc, acc_rope, final_factor(row_max, row_sum, sink, HAS_SINK), exists, TAIL)
    tl.store(lse_rows, lse_base_2(row_max, row_sum, float("inf")) * LN2, mask=exists)


@jit
def store_partial(
    partial_out: tl.tensor,
    partial_lse: tl.tensor,
    tile: tl.tensor,
    acc: tl.tensor,
    acc_rope: tl.tensor,
    row_max: tl.tensor,
    row_sum: tl.tensor,
    exists: tl.tensor,
    BLOCK_M: tl.constexpr,
    TAIL: tl.constexpr,
) -> None:
    """Write tile number `tile` (64 bits) of the partial results: the attention over the piece's keys alone, and the
    base-2 logarithm of its sum; a row without keys there has 0 and -inf.
    """
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    lse = lse_base_2(row_max, row_sum, float("-inf"))
    # By the rounded logarithm, whose rounding the weights of the pieces then undo.
    factor = tl.where(row_sum == 0.0, 0.0, tl.exp2(row_max - lse))
    store_columns(partial_out + rows * D_V, acc, acc_rope, factor, exists, TAIL)
    tl.store(partial_lse + rows, lse, mask=exists)
