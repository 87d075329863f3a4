"""Softmax over keys that come in blocks: what the attention functions of the reference share."""

import torch
from torch import Tensor


class OnlineSoftmax:
    """Running maximum, sum and weighted sum of values of some rows of scores.

    Rows are `[n, rows]`, in batches of `n`. Masked scores are -inf.
    """

    def __init__(self, q: Tensor, d_v: int, probability_dtype: torch.dtype | None = None) -> None:
        """For the rows of q `[n, rows, d]`; `probability_dtype` rounds the probabilities before they meet V, as
        tensor-core kernels do.
        """
        n, rows, _ = q.shape
        self.row_max = q.new_full((n, rows, 1), float("-inf"))
        self.row_sum = q.new_zeros((n, rows, 1))
        self.acc = q.new_zeros((n, rows, d_v))
        self._probability_dtype = probability_dtype

    def add(self, scores: Tensor, values: Tensor) -> None:
        """Take in a block of keys: scores `[n, rows, keys]`, which are overwritten, and values `[n, keys, d_v]`."""
        new_max = torch.maximum(self.row_max, scores.amax(-1, keepdim=True))
        origin = new_max.masked_fill(new_max == float("-inf"), 0.0)  # -inf - -inf is NaN
        p = scores.sub_(origin).exp_()
        rescale = (self.row_max - origin).exp_()
        self.row_sum = self.row_sum * rescale + p.sum(-1, keepdim=True)
        if self._probability_dtype is not None:
            p = p.to(self._probability_dtype).to(values.dtype)
        self.acc.mul_(rescale).baddbmm_(p, values)
        self.row_max = new_max

    def out(self) -> Tensor:
        """`[n, rows, d_v]`; NaN where a row saw no key."""
        return self.acc / self.row_sum

    def lse(self) -> Tensor:
        """`[n, rows]`, natural log; -inf where a row saw no key."""
        return (self.row_max + self.row_sum.log())[..., 0]

    def max_logits(self) -> Tensor:
        """`[n, rows]`: the largest score; -inf where a row saw no key."""
        return self.row_max[..., 0]
