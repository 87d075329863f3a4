"""`merge_attention_states`: one attention from attentions over disjoint keys."""

from collections.abc import Sequence

from torch import Tensor

from flash_mla import backends, errors, problem


def merge_attention_states(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Combine partial results over disjoint sets of keys (context parallelism, a shared prefix).

    `lse = ln(sum_i exp(lse_i))` and `out = sum_i exp(lse_i - lse) * out_i`: attention over the union of the keys,
    within rounding. A part without keys (lse +inf, as the attention functions give it, or -inf) is neutral, whatever
    its out holds; where no part has keys the result is out 0, lse +inf. An attention sink must enter one part at the
    most.

    Args:
        outs: parts `[b, s_q, h_q, d]` or `[tokens, h_q, d]`; bfloat16, float16 or float32, all alike.
        lses: float32, natural log, `[b, h_q, s_q]` or `[tokens, h_q]` each.

    Returns:
        out and lse, shaped like one part.

    Raises:
        ValueError, TypeError: naming the wrong part.
    """
    outs, lses = list(outs), list(lses)
    try:
        out, lse = backends.active.merge_attention_states(outs, lses)
    except Exception as error:
        problem.check_merge(outs, lses)
        operators = backends.behind_cuda(errors.from_native(error), outs[0])
        out, lse = operators.merge_attention_states(outs, lses)
    return out, lse
