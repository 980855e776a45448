"""Recall at K, ranks and rSum of image-text retrieval, in both directions, without an (n, m) matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.checks import check_choice, check_int, check_tensor, describe
from hrem_layers.retrieval.ranks import Cosines, Given, exact_device, items_ahead

_Ids = Tensor | np.ndarray | Sequence[int]


class DirectionMetrics(NamedTuple):
    """One direction of retrieval: recalls in percent, ranks counted from 1.

    ``median_rank`` is rounded down to a whole rank, as the field's scripts do it. ``num_queries`` is the
    number of queries that the figures are taken over.
    """

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float
    num_queries: int


class RetrievalMetrics(NamedTuple):
    """Both directions of retrieval. ``i2t``: images ask for texts; ``t2i``: texts ask for images.

    ``str(metrics)`` is :meth:`table`.
    """

    i2t: DirectionMetrics
    t2i: DirectionMetrics

    @property
    def rsum(self) -> float:
        """The sum of the six recalls, 0 to 600."""
        return sum(self.i2t[:3]) + sum(self.t2i[:3])

    def as_dict(self) -> dict[str, float]:
        """``i2t_r1``, ..., ``i2t_mean_rank``, ``t2i_r1``, ..., ``rsum``: 11 floats for JSON or a logger."""
        figures = {
            f"{name}_{field}": value
            for name, direction in zip(self._fields, self, strict=True)
            for field, value in direction._asdict().items()
            if field != "num_queries"
        }
        return {**figures, "rsum": self.rsum}

    def table(self) -> str:
        """The figures as four lines of plain text."""
        lines = [f"{'':<15}{'R@1':>7}{'R@5':>7}{'R@10':>7}{'median':>9}{'mean':>9}{'queries':>10}"]
        for name, d in (("image to text", self.i2t), ("text to image", self.t2i)):
            lines.append(
                f"{name:<15}{d.r1:>7.1f}{d.r5:>7.1f}{d.r10:>7.1f}"
                f"{d.median_rank:>9.1f}{d.mean_rank:>9.1f}{d.num_queries:>10}"
            )
        return "\n".join([*lines, f"rSum {self.rsum:.1f}"])

    def __str__(self) -> str:
        return self.table()


@torch.no_grad()
def retrieval_metrics(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: _Ids | None = None,
    text_ids: _Ids | None = None,
    captions_per_image: int | None = None,
    ties: str = "pessimistic",
    unmatched: str = "error",
    chunk_size: int | None = None,
) -> RetrievalMetrics:
    """Retrieval by the cosine of embeddings.

    Which texts describe which image is said in one of three ways: by ids (equal ids match; any number of
    texts an image, in any order; several images may share an id); by ``captions_per_image`` = k (texts
    k·i to k·i + k - 1 describe image i); or by neither, if n = m and row i of both belongs together.

    Every row is an item of its own: an image that occurs five times is asked five times, and takes up
    five places in the ranking for a text that describes another. The figures of the literature have each
    image once, so leave out the repeats that dev and test files hold (``image_embedding[::5]``).

    Args:
        image_embedding: (n, D) floating point, of any scale: normalised inside. A row of zeros is given
            similarity 0 with everything.
        text_embedding: (m, D), on the same device; its dtype may be another.
        image_ids: (n,) integers. None = row numbers.
        text_ids: (m,) integers, the id of the image that each text describes.
        captions_per_image: at least 1; m must be n times it. Not together with ids.
        ties: whether a non-matching item exactly as similar as the best match is ahead of it
            (``"pessimistic"``) or behind it (``"optimistic"``). Cosines that differ by less than about
            1e-8 may be found equal.
        unmatched: what becomes of images without a text and texts without an image. ``"error"`` raises;
            ``"distractor"`` keeps them as items to be found, but they ask no query (``num_queries`` tells
            how many did).
        chunk_size: similarities of at most this many images and this many texts exist at a time, about
            9 · chunk_size² bytes; None = 1024 on a CPU, 8192 elsewhere. It changes no figure. Apart
            from this the working memory is a copy of the embeddings in 4 bytes an element.

    Raises:
        ValueError: sizes do not fit together, an embedding is not finite, or something has no match.
        TypeError: embeddings are not floating-point tensors, or ids not integers.
    """
    counts = _check_embeddings(image_embedding, text_embedding)
    _check_options(ties=ties, chunk_size=chunk_size)
    ids = _resolve_ids(counts, exact_device(image_embedding), image_ids, text_ids, captions_per_image)
    _check_matched(*ids, unmatched=unmatched)
    similarity = Cosines.of(image_embedding, text_embedding)
    return _metrics(similarity, *ids, ties=ties, chunk_size=chunk_size)


@torch.no_grad()
def retrieval_metrics_from_similarity(
    similarity: Tensor,
    *,
    image_ids: _Ids | None = None,
    text_ids: _Ids | None = None,
    captions_per_image: int | None = None,
    ties: str = "pessimistic",
    unmatched: str = "error",
    chunk_size: int | None = None,
) -> RetrievalMetrics:
    """Retrieval by ready similarities, such as the mean of two models'.

    Args:
        similarity: (n, m) floating point, a row an image, a column a text, larger = more similar; compared
            as it stands. Infinities are allowed (-inf = ruled out), NaN is not: it has no rank.

    Everything else is as in :func:`retrieval_metrics`.
    """
    counts = _check_similarity(similarity)
    _check_options(ties=ties, chunk_size=chunk_size)
    ids = _resolve_ids(counts, similarity.device, image_ids, text_ids, captions_per_image)
    _check_matched(*ids, unmatched=unmatched)
    return _metrics(Given(similarity), *ids, ties=ties, chunk_size=chunk_size)


@torch.no_grad()
def five_fold_metrics(
    image_embedding: Tensor,
    text_embedding: Tensor,
    *,
    image_ids: _Ids | None = None,
    text_ids: _Ids | None = None,
    captions_per_image: int | None = None,
    num_folds: int = 5,
    ties: str = "pessimistic",
    chunk_size: int | None = None,
) -> RetrievalMetrics:
    """Retrieval within each of ``num_folds`` parts, and the mean over the parts: COCO's "1K test".

    The distinct images, in the order in which they first occur, are cut into ``num_folds`` runs of equal
    length (COCO's 5,000 into 5 of 1,000; lengths that do not divide differ by one image at most). A text
    goes with its image. Every figure is the plain mean over the parts, also the median rank, which may
    thus be fractional; ``num_queries`` is the sum.

    Arguments and errors are those of :func:`retrieval_metrics`; besides, every image needs a text and
    every text an image, and ``num_folds`` (at least 1) may not exceed the number of distinct images.
    """
    counts = _check_embeddings(image_embedding, text_embedding)
    _check_options(ties=ties, chunk_size=chunk_size)
    ids = _resolve_ids(counts, exact_device(image_embedding), image_ids, text_ids, captions_per_image)
    folds = _fold_numbers(*ids, num_folds)
    similarity = Cosines.of(image_embedding, text_embedding)
    return _mean_over_folds(similarity, *ids, *folds, ties=ties, chunk_size=chunk_size)


@torch.no_grad()
def five_fold_metrics_from_similarity(
    similarity: Tensor,
    *,
    image_ids: _Ids | None = None,
    text_ids: _Ids | None = None,
    captions_per_image: int | None = None,
    num_folds: int = 5,
    ties: str = "pessimistic",
    chunk_size: int | None = None,
) -> RetrievalMetrics:
    """:func:`five_fold_metrics` by ready similarities, as in :func:`retrieval_metrics_from_similarity`.

    Each part of the matrix is copied in its turn.
    """
    counts = _check_similarity(similarity)
    _check_options(ties=ties, chunk_size=chunk_size)
    ids = _resolve_ids(counts, similarity.device, image_ids, text_ids, captions_per_image)
    folds = _fold_numbers(*ids, num_folds)
    return _mean_over_folds(Given(similarity), *ids, *folds, ties=ties, chunk_size=chunk_size)


def _metrics(
    similarity: Cosines | Given,
    image_ids: Tensor,
    text_ids: Tensor,
    *,
    ties: str,
    chunk_size: int | None,
) -> RetrievalMetrics:
    image_ahead, text_ahead = items_ahead(similarity, image_ids, text_ids, ties, chunk_size)
    return RetrievalMetrics(
        i2t=_summarise(image_ahead[torch.isin(image_ids, text_ids)]),
        t2i=_summarise(text_ahead[torch.isin(text_ids, image_ids)]),
    )


def _summarise(ahead: Tensor) -> DirectionMetrics:
    """The figures of queries whose best match has ``ahead`` (q,) items before it."""
    ahead = ahead.cpu().sort().values
    count = len(ahead)
    hits = torch.searchsorted(ahead, torch.tensor([1, 5, 10], device="cpu")).tolist()
    median = int(ahead[(count - 1) // 2] + ahead[count // 2]) // 2
    return DirectionMetrics(
        *(100.0 * hit / count for hit in hits),
        median_rank=float(median + 1),
        mean_rank=int(ahead.sum()) / count + 1,
        num_queries=count,
    )


def _mean_over_folds(
    similarity: Cosines | Given,
    image_ids: Tensor,
    text_ids: Tensor,
    image_fold: Tensor,
    text_fold: Tensor,
    *,
    ties: str,
    chunk_size: int | None,
) -> RetrievalMetrics:
    results = []
    for fold in range(int(image_fold.max()) + 1):
        rows = (image_fold == fold).nonzero()[:, 0]
        columns = (text_fold == fold).nonzero()[:, 0]
        part = similarity.select(rows, columns)
        results.append(_metrics(part, image_ids[rows], text_ids[columns], ties=ties, chunk_size=chunk_size))

    def mean(directions: list[DirectionMetrics]) -> DirectionMetrics:
        *figures, queries = zip(*directions, strict=True)
        return DirectionMetrics(*(sum(figure) / len(figure) for figure in figures), num_queries=sum(queries))

    return RetrievalMetrics(mean([r.i2t for r in results]), mean([r.t2i for r in results]))


# ---- what the caller gave --------------------------------------------------------------------------


def _check_options(*, ties: str, chunk_size: int | None) -> None:
    check_choice("ties", ties, ("pessimistic", "optimistic"))
    if chunk_size is not None:
        check_int("chunk_size", chunk_size, minimum=1)


def _check_embeddings(image_embedding: Tensor, text_embedding: Tensor) -> tuple[int, int]:
    check_tensor("image_embedding", image_embedding, ("n", "D"))
    check_tensor("text_embedding", text_embedding, ("m", image_embedding.shape[1]), device=image_embedding.device)
    for name, tensor in (("image_embedding", image_embedding), ("text_embedding", text_embedding)):
        _check_not_empty(name, tensor)
    return image_embedding.shape[0], text_embedding.shape[0]


def _check_similarity(similarity: Tensor) -> tuple[int, int]:
    check_tensor("similarity", similarity, ("n", "m"))
    _check_not_empty("similarity", similarity)
    if similarity.amax().isnan():  # amax hands NaN on, and unlike isnan() needs no memory
        row = int(similarity.amax(dim=1).isnan().nonzero()[0])
        raise ValueError(f"similarity must not hold NaN, got it in row {row}: {describe(similarity)}")
    return similarity.shape[0], similarity.shape[1]


def _check_not_empty(name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {describe(tensor)}")


def _resolve_ids(
    counts: tuple[int, int],
    device: torch.device,
    image_ids: _Ids | None,
    text_ids: _Ids | None,
    captions_per_image: int | None,
) -> tuple[Tensor, Tensor]:
    """(n,) and (m,) int64 on ``device``, equal where an image and a text match."""
    n, m = counts
    if captions_per_image is not None:
        check_int("captions_per_image", captions_per_image, minimum=1)
        if image_ids is not None or text_ids is not None:
            raise ValueError("captions_per_image and ids exclude one another, got both")
        if m != n * captions_per_image:
            repeated = f" (are images repeated? then pass every {captions_per_image}th)" if m == n else ""
            raise ValueError(
                f"captions_per_image={captions_per_image} expects {n} * {captions_per_image} = "
                f"{n * captions_per_image} texts for {n} images, got {m} texts{repeated}"
            )
    elif text_ids is None:
        if image_ids is not None:
            raise ValueError("text_ids must be given with image_ids, got None")
        if m != n:
            raise ValueError(
                f"without ids or captions_per_image there must be as many texts as images, got {n} images and {m} texts"
            )
    texts = torch.arange(m, device=device) // (captions_per_image or 1)
    images = torch.arange(n, device=device)
    if text_ids is not None:
        texts = _id_tensor("text_ids", text_ids, m, device)
    if image_ids is not None:
        images = _id_tensor("image_ids", image_ids, n, device)
    return images, texts


def _id_tensor(name: str, ids: _Ids, count: int, device: torch.device) -> Tensor:
    try:
        tensor = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers of shape ({count},), got {type(ids).__name__}") from error
    if tensor.shape != (count,):
        raise ValueError(f"{name} must have shape ({count},), got {describe(tensor)}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {describe(tensor)}")
    return tensor.to(device, torch.int64)


def _check_matched(image_ids: Tensor, text_ids: Tensor, *, unmatched: str) -> None:
    """Error unless everything has a match or, with ``"distractor"``, unless anything has."""
    check_choice("unmatched", unmatched, ("error", "distractor"))
    lone_images = image_ids[~torch.isin(image_ids, text_ids)]
    lone_texts = text_ids[~torch.isin(text_ids, image_ids)]
    if unmatched == "distractor":
        if len(lone_images) == len(image_ids):
            raise ValueError("image_ids and text_ids have no id in common: there is nothing to retrieve")
        return
    for lone, ids, what, other in (
        (lone_images, image_ids, "image_ids", "text"),
        (lone_texts, text_ids, "text_ids", "image"),
    ):
        if len(lone):
            some = ", ".join(map(str, lone[:5].tolist())) + (", ..." if len(lone) > 5 else "")
            raise ValueError(
                f"{what}: {len(lone)} of {len(ids)} have no {other} of the same id ({some}); leave them out, "
                f"or keep them in the gallery alone with unmatched='distractor' (not with folds)"
            )


def _fold_numbers(image_ids: Tensor, text_ids: Tensor, num_folds: int) -> tuple[Tensor, Tensor]:
    """(n,) and (m,): the fold of each image and text, by the order in which image ids first occur."""
    check_int("num_folds", num_folds, minimum=1)
    _check_matched(image_ids, text_ids, unmatched="error")
    distinct, index = image_ids.unique(return_inverse=True)
    if num_folds > len(distinct):
        raise ValueError(f"num_folds must be at most the number of images, {len(distinct)}, got {num_folds}")
    positions = torch.arange(len(index), device=index.device)
    first = torch.full_like(distinct, len(index)).scatter_reduce(0, index, positions, "amin")
    fold = first.argsort().argsort() * num_folds // len(distinct)
    return fold[index], fold[torch.searchsorted(distinct, text_ids)]
