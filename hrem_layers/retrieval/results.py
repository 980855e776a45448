"""What retrieval metrics are returned as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class DirectionMetrics(NamedTuple):
    """One direction of retrieval: recalls in percent, positions counted from 1.

    ``median_rank`` and ``mean_rank`` (the field's names) are of the positions of the best matches; the median is
    rounded down to a whole position, as the field's scripts do it. ``num_queries`` is the number of queries that
    the figures are taken over.

    >>> DirectionMetrics(50.0, 90.0, 100.0, median_rank=1.0, mean_rank=2.3, num_queries=10).r5
    90.0
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    num_queries: int


@dataclass(frozen=True)
class RetrievalMetrics:
    """Both directions of retrieval; ``i2t, t2i = metrics`` unpacks them, ``str(metrics)`` is :meth:`table`.

    Attributes:
        i2t: images ask for texts.
        t2i: texts ask for images.
        folds: the figures of each fold, if there were folds; ``i2t`` and ``t2i`` are then the plain means over
            them, also the median, which may thus be fractional, and ``num_queries`` is the sum. Else ``()``.

    >>> import torch
    >>> from hrem_layers import retrieval_metrics_from_similarity
    >>> metrics = retrieval_metrics_from_similarity(torch.tensor([[0.9, 0.1], [0.8, 0.7]]))
    >>> metrics.i2t.r1, metrics.t2i.r1, metrics.rsum
    (50.0, 100.0, 550.0)
    """

    i2t: DirectionMetrics
    t2i: DirectionMetrics
    folds: tuple[RetrievalMetrics, ...] = ()

    def __iter__(self) -> Iterator[DirectionMetrics]:
        return iter((self.i2t, self.t2i))

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, 0 to 600."""
        return sum(self.i2t[:3]) + sum(self.t2i[:3])

    def as_dict(self) -> dict[str, float]:
        """``i2t_r1``, ..., ``i2t_mean_rank``, ``t2i_r1``, ..., ``rsum``: 11 floats for JSON or a logger."""
        figures = {
            f"{name}_{field}": value
            for name, direction in zip(("i2t", "t2i"), self, strict=True)
            for field, value in direction._asdict().items()
            if field != "num_queries"
        }
        return {**figures, "rsum": self.rsum}

    def table(self) -> str:
        """The figures as four lines of plain text; with folds, the last one gives their range of rSum."""
        lines = [f"{'':<15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median':>9}{'mean':>9}{'queries':>10}"]
        for name, d in (("image to text", self.i2t), ("text to image", self.t2i)):
            lines.append(
                f"{name:<15}{d.r1:>7.1f}{d.r5:>7.1f}{d.r10:>7.1f}"
                f"{d.median_rank:>9.1f}{d.mean_rank:>9.1f}{d.num_queries:>10}"
            )
        rsums = [fold.rsum for fold in self.folds]
        spread = f", mean of {len(rsums)} folds ({min(rsums):.1f} to {max(rsums):.1f})" if rsums else ""
        return "\n".join([*lines, f"rSum {self.rsum:.1f}{spread}"])

    def __str__(self) -> str:
        return self.table()


def mean_over_folds(folds: Sequence[RetrievalMetrics]) -> RetrievalMetrics:
    """The plain mean of every figure; ``num_queries`` is the sum."""

    def mean(directions: list[DirectionMetrics]) -> DirectionMetrics:
        r1, r5, r10, median, average = (sum(figure) / len(figure) for figure in list(zip(*directions, strict=True))[:5])
        return DirectionMetrics(r1, r5, r10, median, average, num_queries=sum(d.num_queries for d in directions))

    return RetrievalMetrics(mean([f.i2t for f in folds]), mean([f.t2i for f in folds]), tuple(folds))
