"""The matrix products of a tile, forward and backward, and the room for what they give."""

from __future__ import annotations

import torch
from torch import Tensor

# A row of a tile begins at a multiple of this many similarities: where rows begin within a cache line, a product on a
# CPU loses up to 40% of its speed.
ROW_MULTIPLE = 16


class Store:
    """Room for the tiles' similarities: first in the buffer that is kept, then in one that is used again."""

    def __init__(self, kept: Tensor, *, filled: bool) -> None:
        self.kept, self.filled, self.used, self.scratch = kept, filled, 0, kept.new_empty(0)

    def take(self, words: int, regions: int) -> tuple[Tensor, bool]:
        """A contiguous matrix (words, regions or some more), and whether it lies in the kept buffer."""
        stride = -(-regions // ROW_MULTIPLE) * ROW_MULTIPLE
        size = words * stride
        if self.used + size <= self.kept.numel():
            self.used += size
            room = self.kept[self.used - size : self.used].view(words, stride)
            if not self.filled:
                room[:, regions:].zero_()  # an operator's output is defined in every element
            return room, True
        if self.scratch.numel() < size:
            self.scratch = self.kept.new_empty(size)
        return self.scratch[:size].view(words, stride), False


def write_product(x: Tensor, y: Tensor, out: Tensor) -> Tensor:
    """x @ yᵀ, written to ``out``."""
    if x.dtype == out.dtype:
        return torch.mm(x, y.t(), out=out)
    return out.copy_(x @ y.t())


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """total += x @ y; the sum over tiles is kept in the dtype of ``total``."""
    if y.dtype == total.dtype:
        torch.addmm(total, x, y, out=total)
    else:
        total += x.to(y.dtype) @ y
