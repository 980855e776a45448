"""Which pairs belong together, without the matrix where ids say it: rows of it, and its counts."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import check_bool_tensor, check_index_tensor
from hrem_layers.losses._pairs import as_bytes


class Positives(NamedTuple):
    """N images and M texts; either ``matrix`` (N, M) bool, or the ids of both sides, equal = together."""

    image_ids: Tensor
    """(N,) integer."""
    text_ids: Tensor
    """(M,) integer."""
    matrix: Tensor | None

    def rows(self, way: int, here: slice) -> Tensor:
        """(n, M) bool of some images (``way`` 0), or (m, N) of some texts (``way`` 1)."""
        if self.matrix is not None:
            return self.matrix[here] if not way else self.matrix[:, here].t().contiguous()
        own, other = (self.image_ids, self.text_ids) if not way else (self.text_ids, self.image_ids)
        return own[here].unsqueeze(1) == other.unsqueeze(0)

    def anchors(self, way: int) -> Tensor:
        """How many images (``way`` 0) or texts (``way`` 1) have a positive, 0-dimensional."""
        if self.matrix is not None:
            return torch.count_nonzero(as_bytes(self.matrix).amax(dim=1 - way))
        own, other = (self.image_ids, self.text_ids) if not way else (self.text_ids, self.image_ids)
        return torch.count_nonzero(_occurrences(own, other))

    def pairs(self) -> Tensor:
        """How many pairs belong together, 0-dimensional."""
        if self.matrix is not None:
            return torch.count_nonzero(self.matrix)
        return _occurrences(self.image_ids, self.text_ids).sum()


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
    elif text_ids is None and n != m:
        raise ValueError(
            f"text_ids must say which image each text belongs to where there are not as many texts as images, got "
            f"{n} images and {m} texts"
        )
    ids = torch.arange(n, device=device) if image_ids is None else image_ids
    text_ids = ids if text_ids is None else text_ids
    return Positives(ids.to(torch.long), text_ids.to(torch.long), positives)
