"""Recall at K, median and mean position and rSum of image-text retrieval, in both directions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hrem_layers._core.checks import check_choice, check_int, check_tensor, describe, said
from hrem_layers.retrieval.matching import (
    Captions,
    Ids,
    Matching,
    fold_members,
    nearly_repeated,
    repeated_rows,
    resolve_matching,
)
from hrem_layers.retrieval.positions import items_ahead
from hrem_layers.retrieval.results import DirectionMetrics, RetrievalMetrics, mean_over_folds
from hrem_layers.retrieval.similarity import FIXED_POINT_ONE, Cosines, Given, exact_device

Progress = Callable[[int, int], object]

_ROUNDING = 1e-4  # the distance of unit vectors up to which two in a row may be one image in two batches


def retrieval_metrics(
    image_embedding: Tensor | np.ndarray,
    text_embedding: Tensor | np.ndarray,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    captions_per_image: Captions | None = None,
    folds: int | None = None,
    ties: str = "pessimistic",
    unmatched: str = "error",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> RetrievalMetrics:
    """Retrieval by the cosine of embeddings.

    Which texts describe which image is said in one of three ways: by ids (equal ids match; any number of texts per
    image, in any order; several images may share an id); by ``captions_per_image`` (a number k: texts k·i to
    k·i + k - 1 describe image i; or a number per image); or by neither, if n = m and row i of both belongs together.

    Every row is an item of its own: an image that occurs five times is asked five times, and takes up five places
    for a text that describes another. The figures of the literature have each image once, so leave out the repeats
    that dev and test files hold (``image_embedding[::5]``). Where ids say nothing of it, exact repeats are warned of.

    Figures are exact: chunk size, order of rows, threads, device, TF32 and autocast change none.

    Args:
        image_embedding: (n, D) floating point, of any scale: normalised inside. A row of zeros is given similarity 0
            with everything. A NumPy array will do.
        text_embedding: (m, D), on the same device; its dtype may be another.
        image_ids: (n,) integers. None = row numbers.
        text_ids: (m,) integers, the id of the image that each text describes.
        captions_per_image: at least 1, and m must be n times it; or (n,) integers of at least 0 with the sum m. Not
            together with ids.
        folds: None = all images and texts are one gallery. A number cuts the distinct images, in the order in which
            they first occur, into so many runs of equal length (COCO's 5,000 into 5 of 1,000: the field's "1K
            test"; lengths that do not divide differ by one image at most). A text goes with its image, each run is
            a gallery of its own, and every figure is the mean over the runs. At most the number of distinct images;
            every image needs a text and every text an image.
        ties: whether a non-matching item exactly as similar as the best match is ahead of it (``"pessimistic"``) or
            behind it (``"optimistic"``). Cosines that differ by less than about 1e-8 may be found equal.
        unmatched: what becomes of images without a text and texts without an image. ``"error"`` raises;
            ``"distractor"`` keeps them as items to be found, but they ask no query (``num_queries`` tells how many
            did); not with ``folds``.
        chunk_size: similarities of at most this many images and this many texts exist at a time, about
            16 · chunk_size² bytes; None = 1024 on a CPU, 8192 elsewhere. It changes no figure. Apart from this the
            working memory is a copy of the embeddings in 4 bytes per element.
        progress: called as ``progress(done, total)`` after each chunk, with numbers of image-text pairs.

    Raises:
        ValueError: sizes do not fit together, an embedding is not finite, or something has no match.
        TypeError: embeddings are not floating point, or ids not integers.

    Warns:
        UserWarning: rows of ``image_embedding`` repeat earlier ones, or all stand in runs of equal length whose rows
            are equal but for rounding, and no ``image_ids`` are given.

    >>> import torch
    >>> images = torch.eye(3)
    >>> texts = images.repeat_interleave(2, dim=0) + 0.1  # two captions per image
    >>> metrics = retrieval_metrics(images, texts, captions_per_image=2)
    >>> metrics.t2i.r1, metrics.i2t.num_queries, metrics.t2i.num_queries
    (100.0, 3, 6)
    """
    images = _check_filled("image_embedding", image_embedding, ("n", "D"))
    texts = _check_filled("text_embedding", text_embedding, ("m", images.shape[1]), images.device)
    options = _Options.checked(ties, chunk_size, folds, unmatched, progress)
    counts = images.shape[0], texts.shape[0]
    with torch.no_grad():
        matching = resolve_matching(counts, exact_device(images), image_ids, text_ids, captions_per_image, unmatched)
        members = _members(matching, folds)
        similarity = Cosines.of(images, texts)
        if image_ids is None:
            _warn_of_repeats("image_embedding", similarity)
        return _metrics(similarity, matching, members, options)


def retrieval_metrics_from_similarity(
    similarity: Tensor | np.ndarray,
    *,
    image_ids: Ids | None = None,
    text_ids: Ids | None = None,
    captions_per_image: Captions | None = None,
    folds: int | None = None,
    ties: str = "pessimistic",
    unmatched: str = "error",
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> RetrievalMetrics:
    """Retrieval by ready similarities, such as the mean of two models'.

    Args:
        similarity: (n, m) floating point, a row per image, a column per text, larger = more similar; compared as it
            stands. Infinities are allowed (-inf = ruled out), NaN is not: it has no place in an order. A NumPy array
            will do. With ``folds``, each part of the matrix is copied in its turn.

    Everything else is as in :func:`retrieval_metrics`.

    >>> import torch
    >>> similarity = torch.tensor([[0.9, 0.4, 0.3], [0.1, 0.5, 0.2]])  # 2 images, 3 texts
    >>> metrics = retrieval_metrics_from_similarity(similarity, captions_per_image=[1, 2])
    >>> metrics.i2t.r1, round(metrics.t2i.r1, 1)
    (100.0, 66.7)
    """
    given = _check_filled("similarity", similarity, ("n", "m"))
    options = _Options.checked(ties, chunk_size, folds, unmatched, progress)
    with torch.no_grad():
        _check_no_nan(given)
        counts = given.shape[0], given.shape[1]
        matching = resolve_matching(counts, given.device, image_ids, text_ids, captions_per_image, unmatched)
        members = _members(matching, folds)
        if image_ids is None:
            _warn_of_repeats("similarity", Given(given))
        return _metrics(Given(given), matching, members, options)


class _Options(NamedTuple):
    ties: str
    chunk_size: int | None
    progress: Progress | None

    @classmethod
    def checked(
        cls, ties: str, chunk_size: int | None, folds: int | None, unmatched: str, progress: Progress | None
    ) -> _Options:
        check_choice("ties", ties, ("pessimistic", "optimistic"))
        if chunk_size is not None:
            chunk_size = check_int("chunk_size", chunk_size, minimum=1)
        if folds is not None:
            check_int("folds", folds, minimum=1)
            if unmatched == "distractor":
                raise ValueError("folds and unmatched='distractor' exclude one another: a fold needs both sides")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be callable as progress(done, total), got {said(progress)}")
        return cls(ties, chunk_size, progress)


def _check_filled(
    name: str, values: object, shape: tuple[int | str, ...], device: torch.device | None = None
) -> Tensor:
    """A floating-point tensor of this shape, with numbers in it; a NumPy array becomes one that shares its memory."""
    tensor = check_tensor(name, _from_numpy(name, values) if isinstance(values, np.ndarray) else values, shape)
    if tensor.numel() == 0:
        raise ValueError(f"{name} must not be empty, got {describe(tensor)}")
    if tensor.device != (device or tensor.device):
        raise ValueError(f"{name} must be on {device} like image_embedding, got {describe(tensor)}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name} must hold numbers, got {describe(tensor)}")
    return tensor


def _from_numpy(name: str, values: np.ndarray) -> Tensor:
    if values.dtype.kind != "f" or values.dtype.itemsize > 8:
        raise TypeError(f"{name} must be float16, float32 or float64, got {said(values)}")
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("="))  # neither backwards nor of foreign order
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor is it written to
        return torch.from_numpy(values)


def _check_no_nan(similarity: Tensor) -> None:
    bad = similarity.amax(dim=1).isnan().nonzero()[:, 0]  # amax hands NaN on, and unlike isnan() needs no memory
    if len(bad):
        raise ValueError(
            f"similarity must not hold NaN, got it in row {int(bad[0])}: {len(bad)} of {len(similarity)} rows, "
            f"{describe(similarity)}"
        )


def _warn_of_repeats(name: str, similarity: Cosines | Given) -> None:
    rows = similarity.images if isinstance(similarity, Cosines) else similarity.similarity
    repeats, run = repeated_rows(rows)
    how = "exactly"
    if isinstance(similarity, Cosines) and not repeats:
        run = nearly_repeated(rows, _ROUNDING * FIXED_POINT_ONE)
        repeats, how = 0 if run is None else len(rows) - len(rows) // run, "but for rounding"
    if repeats:
        once = f"if images stand once per caption, pass {name}[::{run}] with captions_per_image={run}; " if run else ""
        warnings.warn(
            f"{repeats} of {len(rows)} rows of {name} repeat an earlier row {how}, yet each counts as an image of "
            f"its own, and ties with its copies: {once}to keep the copies, say with image_ids which are one image",
            stacklevel=3,
        )


def _members(matching: Matching, folds: int | None) -> list[tuple[Tensor, Tensor]] | None:
    return None if folds is None else fold_members(matching, int(folds))


def _metrics(
    similarity: Cosines | Given,
    matching: Matching,
    members: Sequence[tuple[Tensor, Tensor]] | None,
    options: _Options,
) -> RetrievalMetrics:
    if members is None:
        return _whole(similarity, matching, options, _counter(options, len(matching.images) * len(matching.texts)))
    advance = _counter(options, sum(len(rows) * len(columns) for rows, columns in members))
    return mean_over_folds([
        _whole(similarity.select(*at), matching.select(*at), options, advance) for at in members
    ])  # fmt: skip


def _counter(options: _Options, total: int) -> Callable[[int], None]:
    """Adds up the pairs that are done and tells the caller's hook."""
    done = 0

    def advance(pairs: int) -> None:
        nonlocal done
        done += pairs
        if options.progress is not None:
            options.progress(done, total)

    return advance


def _whole(
    similarity: Cosines | Given, matching: Matching, options: _Options, advance: Callable[[int], None]
) -> RetrievalMetrics:
    image_ahead, text_ahead = items_ahead(
        similarity, matching.images, matching.texts, options.ties, options.chunk_size, advance
    )
    if matching.distractors:  # they ask no query
        image_ahead = image_ahead[torch.isin(matching.images, matching.texts)]
        text_ahead = text_ahead[torch.isin(matching.texts, matching.images)]
    return RetrievalMetrics(i2t=_summarise(image_ahead), t2i=_summarise(text_ahead))


def _summarise(ahead: Tensor) -> DirectionMetrics:
    """The figures of queries whose best match has ``ahead`` (q,) items before it."""
    counts = np.sort(ahead.cpu().numpy())  # NumPy, whose calls cost less: there are few numbers
    count = len(counts)
    r1, r5, r10 = (100.0 * int(np.searchsorted(counts, k)) / count for k in (1, 5, 10))
    median = int(counts[(count - 1) // 2] + counts[count // 2]) // 2
    return DirectionMetrics(
        r1,
        r5,
        r10,
        median_rank=float(median + 1),
        mean_rank=int(counts.sum()) / count + 1,
        num_queries=count,
    )
