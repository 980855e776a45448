"""How many items are ahead of each query's best match, exactly, and without an (n, m) matrix.

A query's position is 1 + the number of items ahead of its best match: those that do not match the query and score
higher than that match or, with pessimistic ties, as high. First the best match of every query is looked for among
the pairs that match, then all pairs are compared with it, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from hrem_layers.retrieval.screening import Screen, count_ahead, float32_is_exact_enough
from hrem_layers.retrieval.similarity import Cosines, Given

# A block of matching pairs is as wide as the texts of all its images together, so the lower it is, the fewer pairs
# that do not match are computed with them; but a block that is very low costs more calls than products.
_LOWEST_BLOCK, _HIGHEST_BLOCK = 16, 256
# Where so many pairs match for each item, at most, they are multiplied one by one.
_FEW_MATCHES = 4
# Up to so many multiplications, all of them in float64 take less time than the steps of a screen. Beside them the
# comparisons of a pair take as long as so many.
_FEW_PRODUCTS, _COMPARISONS = 2**28, 64
# Counts within a block are sums of ones in float32.
_LARGEST_CHUNK = 2**20


def items_ahead(
    similarity: Cosines | Given,
    image_ids: Tensor,
    text_ids: Tensor,
    ties: str,
    chunk_size: int | None,
    advance: Callable[[int], None] = lambda pairs: None,
) -> tuple[Tensor, Tensor]:
    """(n,) and (m,) int64: how many items are ahead of each image's, each text's best match.

    Meaningless for a query that has no match. ``advance`` is told the number of pairs of every block that is done.
    """
    if chunk_size is None:
        chunk_size = 1024 if similarity.device.type == "cpu" else 8192
    chunk_size = min(chunk_size, _LARGEST_CHUNK)
    if isinstance(similarity, Cosines) and not _screen_pays(similarity) and _is_one_block(similarity, chunk_size):
        # once, for the best matches and for all pairs
        similarity = Given(similarity.block(slice(None), slice(None)))
    best = BestMatches.of(similarity, image_ids, text_ids, chunk_size)
    image_ahead = torch.zeros_like(image_ids)
    text_ahead = torch.zeros_like(text_ids)
    screen = None
    if isinstance(similarity, Cosines) and _screen_pays(similarity) and float32_is_exact_enough(similarity.images):
        screen = Screen(similarity, best.image, best.text, ties, chunk_size)
    for columns in _slices(len(text_ids), chunk_size):
        for rows in _slices(len(image_ids), chunk_size):
            if screen is not None:
                (images, by_image), (texts, by_text) = screen.count(rows, columns)
                image_ahead[images] += by_image
                text_ahead[texts] += by_text
            else:
                block = similarity.block(rows, columns)
                by_image, by_text = count_ahead(block, best.image[rows], best.text[columns], ties)
                image_ahead[rows] += by_image
                text_ahead[columns] += by_text
            advance(len(image_ids[rows]) * len(text_ids[columns]))
    if ties == "pessimistic":
        # A match cannot exceed the best match, but it equals it: those were counted as well.
        image_ahead -= best.image_ties
        text_ahead -= best.text_ties
    return image_ahead, text_ahead


def _screen_pays(similarity: Cosines) -> bool:
    images, width = similarity.images.shape
    return images * len(similarity.texts) * (width + _COMPARISONS) > _FEW_PRODUCTS


def _is_one_block(similarity: Cosines, chunk_size: int) -> bool:
    return len(similarity.images) * len(similarity.texts) <= chunk_size**2


class BestMatches:
    """The largest similarity of each image and each text with any that matches it, and how many matches have it."""

    def __init__(self, similarity: Cosines | Given, image_ids: Tensor, text_ids: Tensor) -> None:
        self.image = torch.full_like(image_ids, -torch.inf, dtype=similarity.dtype)
        self.text = torch.full_like(text_ids, -torch.inf, dtype=similarity.dtype)
        self.image_ties = torch.zeros_like(image_ids)
        self.text_ties = torch.zeros_like(text_ids)

    @classmethod
    def of(cls, similarity: Cosines | Given, image_ids: Tensor, text_ids: Tensor, chunk_size: int) -> BestMatches:
        best = cls(similarity, image_ids, text_ids)
        pairs = _matching_pairs(image_ids, text_ids, _FEW_MATCHES * (len(image_ids) + len(text_ids)))
        if pairs is not None:
            exact = similarity.pairs(*pairs)
            for queries, found, ties in zip(
                pairs, (best.image, best.text), (best.image_ties, best.text_ties), strict=True
            ):
                found.scatter_reduce_(0, queries, exact, "amax")
                ties.index_add_(0, queries, (exact == found[queries]).long())
            return best
        for rows, columns in _matching_blocks(image_ids, text_ids, chunk_size):
            match = image_ids[rows, None] == text_ids[columns]
            block = similarity.block(rows, columns)
            _add_matches(best.image, best.image_ties, rows, block, match)
            _add_matches(best.text, best.text_ties, columns, block.T, match.T)
        return best


def _add_matches(best: Tensor, ties: Tensor, queries: Tensor, block: Tensor, match: Tensor) -> None:
    """Takes a block (queries, items) of similarities into ``best`` and ``ties``, in place."""
    before = best[queries]
    after = torch.maximum(before, block.masked_fill(~match, -torch.inf).amax(dim=1))
    equal = ((block == after[:, None]) & match).sum(dim=1)
    ties[queries] = torch.where(after == before, ties[queries], 0) + equal
    best[queries] = after


def _matching_pairs(image_ids: Tensor, text_ids: Tensor, most: int) -> tuple[Tensor, Tensor] | None:
    """(p,) rows and columns of all pairs that match; None if they are more than ``most``."""
    order = text_ids.argsort()
    sorted_texts = text_ids[order]
    starts = torch.searchsorted(sorted_texts, image_ids)
    counts = torch.searchsorted(sorted_texts, image_ids, right=True) - starts
    total = int(counts.sum())
    if total > most:
        return None
    rows = torch.repeat_interleave(counts, output_size=total)
    before = counts.cumsum(dim=0) - counts  # pairs of earlier rows
    places = torch.arange(total, device=rows.device) + (starts - before)[rows]
    return rows, order[places]


def _matching_blocks(image_ids: Tensor, text_ids: Tensor, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(rows, columns) of blocks that together hold every matching pair once.

    With images and texts sorted by id, the matches of a run of images are a run of texts. So this is a narrow band
    of the matrix when each id has few texts, and never more than all of it.
    """
    image_order, text_order = image_ids.argsort(), text_ids.argsort()
    images_per_id = len(image_ids) // len(torch.unique(image_ids))
    runs = torch.split(image_order, min(chunk_size, max(_LOWEST_BLOCK, min(_HIGHEST_BLOCK, images_per_id))))
    sorted_texts = text_ids[text_order]
    starts = torch.searchsorted(sorted_texts, image_ids[torch.stack([run[0] for run in runs])])
    ends = torch.searchsorted(sorted_texts, image_ids[torch.stack([run[-1] for run in runs])], right=True)
    for rows, start, end in zip(runs, starts.tolist(), ends.tolist(), strict=True):
        for columns in torch.split(text_order[start:end], chunk_size) if end > start else ():
            yield rows, columns


def _slices(length: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, length)) for start in range(0, length, size))
