"""Which pairs belong together, without the matrix where ids say it: rows of it, and its counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_index_tensor
from hrem_layers.losses._pairs import as_bytes


class PositiveIds(NamedTuple):
    """The ids of N images and M texts, equal = together."""

    image: Tensor
    """(N,) integer."""
    text: Tensor
    """(M,) integer."""

    def rows(self, way: int, here: slice) -> Tensor:
        """(n, M) bool of some images (``way`` 0), or (m, N) of some texts (``way`` 1)."""
        return self[way][here].unsqueeze(1) == self[1 - way].unsqueeze(0)

    def anchors(self, way: int) -> Tensor:
        """How many images (``way`` 0) or texts (``way`` 1) have a positive, 0-dimensional."""
        return torch.count_nonzero(_occurrences(self[way], self[1 - way]))

    def pairs(self) -> Tensor:
        """How many pairs belong together, 0-dimensional."""
        return _occurrences(self.image, self.text).sum()


class PositiveMatrix(NamedTuple):
    """The same of (N, M) bool, True = together."""

    matrix: Tensor

    def rows(self, way: int, here: slice) -> Tensor:
        return self.matrix[here] if not way else self.matrix[:, here].t().contiguous()

    def anchors(self, way: int) -> Tensor:
        return torch.count_nonzero(as_bytes(self.matrix).amax(dim=1 - way))

    def pairs(self) -> Tensor:
        return torch.count_nonzero(self.matrix)


Positives = PositiveIds | PositiveMatrix


def _occurrences(own: Tensor, other: Tensor) -> Tensor:
    """How often each of ``own`` stands in ``other``."""
    ordered = other.sort().values
    return torch.searchsorted(ordered, own, right=True) - torch.searchsorted(ordered, own)


def check_positive_pairs(
    n: int, m: int, device: torch.device, *, image_ids: Tensor | None, text_ids: Tensor | None, positives: Tensor | None
) -> Positives:
    """Raises TypeError or ValueError where they do not fit N images and M texts."""
    if positives is not None and not (image_ids is None and text_ids is None):
        raise ValueError("positives and image_ids or text_ids both say which pairs belong together: give one of them")
    if image_ids is not None:
        check_index_tensor("image_ids", image_ids, (n,), device=device)
    if text_ids is not None:
        check_index_tensor("text_ids", text_ids, (m,), device=device)
    if positives is not None:
        check_bool_tensor("positives", positives, (n, m), device=device, meaning="the pair belongs together")
        return PositiveMatrix(positives)
    if text_ids is None and n != m:
        raise ValueError(
            f"text_ids must say which image each text belongs to where there are not as many texts as images, got "
            f"{n} images and {m} texts"
        )
    ids = torch.arange(n, device=device) if image_ids is None else image_ids
    text_ids = ids if text_ids is None else text_ids
    return PositiveIds(ids.to(torch.long), text_ids.to(torch.long))
