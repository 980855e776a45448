"""What the alignment of images with texts gives, and the names of its modes."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MODES = ("scan", "cosine", "dot")


class Scores(NamedTuple):
    """p (means) and q (largest values) of both directions; the row is the side that receives.

    ``top_*`` are in descending order along the last dimension, with 0 where there is no value.

    Example:
        >>> scores = align_fragments(torch.randn(3, 36, 64), torch.randn(5, 12, 64), topk=10)
        >>> scores.mean_i2t.shape, scores.top_t2i.shape
        (torch.Size([3, 5]), torch.Size([5, 3, 10]))
    """

    mean_i2t: Tensor  # [i, t]
    mean_t2i: Tensor  # [t, i]
    top_i2t: Tensor  # [i, t, k]
    top_t2i: Tensor  # [t, i, k]


class PairScores(NamedTuple):
    """The same four, all with texts in front, as the blocks of the product have them."""

    mean_i2t: Tensor  # [t, i]
    mean_t2i: Tensor  # [t, i]
    top_i2t: Tensor  # [t, i, k]
    top_t2i: Tensor  # [t, i, k]

    @classmethod
    def of(cls, scores: Scores) -> PairScores:
        return cls(scores.mean_i2t.t(), scores.mean_t2i, scores.top_i2t.transpose(0, 1), scores.top_t2i)

    def scores(self) -> Scores:
        return Scores(
            self.mean_i2t.t().contiguous(),
            self.mean_t2i.contiguous(),
            self.top_i2t.transpose(0, 1).contiguous(),
            self.top_t2i.contiguous(),
        )

    def scores_in(self, order: Tensor) -> Scores:
        """The scores with texts in another order."""
        return Scores(
            self.mean_i2t.t().index_select(1, order),
            self.mean_t2i.index_select(0, order),
            self.top_i2t.transpose(0, 1).index_select(1, order),
            self.top_t2i.index_select(0, order),
        )

    def window(self, texts: slice, images: slice) -> PairScores:
        return PairScores(*(x[texts, images] for x in self))


class PairGrads(NamedTuple):
    """The gradients of the four, likewise with texts in front; None: what no gradient flows back from."""

    mean_i2t: Tensor | None
    mean_t2i: Tensor | None
    top_i2t: Tensor | None
    top_t2i: Tensor | None

    @classmethod
    def of(
        cls, mean_i2t: Tensor | None, mean_t2i: Tensor | None, top_i2t: Tensor | None, top_t2i: Tensor | None
    ) -> PairGrads:
        """Of those of :class:`Scores`."""
        turned = (None if x is None else x.transpose(0, 1) for x in (mean_i2t, top_i2t))
        return cls(next(turned), mean_t2i, next(turned), top_t2i)

    def window(self, texts: slice, images: slice) -> PairGrads:
        return PairGrads(*(None if x is None else x[texts, images] for x in self))

    def reordered(self, dim: int, order: Tensor | None) -> PairGrads:
        return self if order is None else PairGrads(*(None if x is None else x.index_select(dim, order) for x in self))
