"""`merge_attention_states`: one attention from attentions over disjoint keys, in Triton."""

import torch
import triton.language as tl
from torch import Tensor

from flash_mla.backends.triton.config import interpreting
from flash_mla.backends.triton.language import LN2, LOG2E, jit_for_any_value, rounded
from flash_mla.backends.triton.launch import OPTIONS, device_of

INTERPRETED_ROWS = 16
"""Rows of one program under the interpreter, where each program costs milliseconds."""


@jit_for_any_value("rows", "s_q", "h_q")
def merge_kernel(
    outs: tl.tensor,
    lses: tl.tensor,
    out_strides: tl.tensor,
    lse_strides: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    rows: tl.tensor,
    s_q: tl.tensor,
    h_q: tl.tensor,
    lse_stride_b: tl.tensor,
    lse_stride_s: tl.tensor,
    lse_stride_h: tl.tensor,
    PARTS: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Grid `(rows / ROWS)`; a row is a (b, s, h). `outs` and `lses` are tuples of tensors `[b, s_q, h_q, D]` and
    `[b, s_q, h_q]`, the strides tuples of three numbers each; `out` is contiguous.

    The logarithms are read twice: first for the weights, then beside the values, so that nothing is kept per part.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    b = (row // h_q // s_q).to(tl.int64)
    s = (row // h_q % s_q).to(tl.int64)
    h = (row % h_q).to(tl.int64)
    columns = tl.arange(0, COLUMNS)
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    for i in tl.static_range(PARTS):
        at = lses[i] + b * lse_strides[i][0] + s * lse_strides[i][1] + h * lse_strides[i][2]
        part = tl.load(at, mask=exists, other=float("inf"))
        # +inf and -inf both stand for a part without keys.
        largest = tl.maximum(largest, tl.where(part == float("inf"), float("-inf"), part))
    origin = tl.where(largest == float("-inf"), 0.0, largest)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i in tl.static_range(PARTS):
        at = lses[i] + b * lse_strides[i][0] + s * lse_strides[i][1] + h * lse_strides[i][2]
        part = tl.load(at, mask=exists, other=float("inf"))
        seen = (part != float("inf")) & (part != float("-inf"))
        weight = tl.where(seen, tl.exp2((tl.where(seen, part, origin) - origin) * LOG2E), 0.0)
        rows_i = outs[i] + b * out_strides[i][0] + s * out_strides[i][1] + h * out_strides[i][2]
        # What a part without keys holds is not read: it may be anything.
        values = tl.load(rows_i[:, None] + columns[None, :], mask=seen[:, None] & (columns < D)[None, :], other=0.0)
        total += weight
        acc += values.to(tl.float32) * weight[:, None]
    none = total == 0.0
    divisor = tl.where(none, 1.0, total)
    at = out + row.to(tl.int64)[:, None] * D + columns[None, :]
    result = rounded(acc / divisor[:, None], out.dtype.element_ty)
    tl.store(at, result, mask=exists[:, None] & (columns < D)[None, :])
    at = lse + b * lse_stride_b + s * lse_stride_s + h * lse_stride_h
    tl.store(at, tl.where(none, float("inf"), origin + tl.log2(divisor) * LN2), mask=exists)


def merge_attention_states(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`out = sum_i exp(lse_i - lse) out_i`, `lse = ln(sum_i exp lse_i)`, over parts that were checked.

    Parts are `[b, s_q, h_q, d]` with lse `[b, h_q, s_q]`, or `[tokens, h_q, d]` with lse `[tokens, h_q]`.
    """
    first = outs[0]
    out = torch.empty(first.shape, dtype=first.dtype, device=first.device)
    lse = torch.empty(lses[0].shape, dtype=torch.float32, device=first.device)
    if first.dim() == 3:  # one more dimension, and the lse's in the order of the out's
        outs, views = [part[:, None] for part in outs], [part[:, None] for part in (*lses, lse)]
    else:
        views = [part.transpose(1, 2) for part in (*lses, lse)]
    b, s_q, h_q, d = outs[0].shape
    rows = b * s_q * h_q
    if rows == 0:
        return out, lse
    block = INTERPRETED_ROWS if interpreting() else 1
    with device_of(first):
        merge_kernel[(-(-rows // block),)](
            tuple(outs),
            tuple(views[:-1]),
            tuple(part.stride()[:3] for part in outs),
            tuple(part.stride() for part in views[:-1]),
            out,
            lse,
            rows,
            s_q,
            h_q,
            *views[-1].stride(),
            PARTS=len(outs),
            D=d,
            ROWS=block,
            COLUMNS=_power_of_two(d),
            num_warps=4 if d > 128 else 1,
            **OPTIONS,
        )
    return out, lse


def _power_of_two(number: int) -> int:
    return max(1 << (number - 1).bit_length(), 16)
