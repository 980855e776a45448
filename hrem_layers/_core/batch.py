"""One batch as the loss gets it: its fields, what is checked of them, and who belongs together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.checks import (
    check_bool_tensor,
    check_index_tensor,
    check_indices,
    check_sides,
    check_tensor,
    describe,
)


class PairIds(NamedTuple):
    """Which pairs belong together, as ids of both sides: equal ids do."""

    image: Tensor
    """(N,) integer."""
    text: Tensor
    """(M,) integer."""

    def back(self) -> PairIds:
        """The other way round."""
        return PairIds(self.text, self.image)

    def matrix(self) -> Tensor:
        """(N, M) bool."""
        return self.image.unsqueeze(1) == self.text.unsqueeze(0)


def turn_pairs(pairs: Tensor | PairIds) -> Tensor | PairIds:
    """A matrix (N, M) of pairs, or their ids, with the texts as the first side."""
    return pairs.back() if isinstance(pairs, PairIds) else pairs.t()


def pairs_at(pairs: Tensor | PairIds, index: Tensor, rows: slice) -> Tensor:
    """(n, k) bool: whether each of the ``rows`` of the first side is a pair with the items ``index`` (n, k)."""
    if isinstance(pairs, PairIds):
        return pairs.image[rows].unsqueeze(1) == pairs.text[index]
    return pairs[rows].gather(1, index)


class Batch(NamedTuple):
    """N images and M texts; the fields are the arguments of :class:`hrem_layers.HREMLoss`."""

    image_embedding: Tensor
    text_embedding: Tensor
    image_fragments: Tensor
    text_fragments: Tensor
    image_mask: Tensor | None
    text_mask: Tensor | None
    image_ids: Tensor | None
    image_index: Tensor | None
    positives: Tensor | None


def check_batch(batch: Batch, embed_dim: int, *, empty: bool) -> None:
    """Raises TypeError or ValueError where the fields do not fit; ``empty``: a batch of none is right as well."""
    check_embeddings(batch.image_embedding, batch.text_embedding, batch.image_index, embed_dim, empty=empty)
    n, m = batch.image_embedding.shape[0], batch.text_embedding.shape[0]
    device = batch.image_embedding.device
    check_fragments("image", batch.image_fragments, batch.image_mask, n, "F", device)
    check_fragments("text", batch.text_fragments, batch.text_mask, m, batch.image_fragments.shape[2], device)
    check_positives(batch.positives, n, m, device)
    check_image_ids(batch.image_ids, n, batch.positives, device)


def check_embeddings(
    image_embedding: Tensor, text_embedding: Tensor, image_index: Tensor | None, embed_dim: int | str, *, empty: bool
) -> None:
    """N images and M texts of one size; M = N unless ``image_index`` says which image each text describes."""
    check_sides(image_embedding, text_embedding, None if image_index is None else "M", embed_dim)
    if image_index is not None:
        check_image_index(image_index, image_embedding.shape[0], text_embedding.shape[0], image_embedding.device)
    if not empty:
        for name, x in (("image_embedding", image_embedding), ("text_embedding", text_embedding)):
            if x.shape[0] < 1:
                raise ValueError(f"{name} must hold at least 1 item, got an empty batch")


def check_image_index(image_index: Tensor, n: int, m: int, device: torch.device) -> None:
    check_index_tensor("image_index", image_index, (m,), device=device)
    if image_index.dtype not in (torch.int64, torch.int32):  # what indexes; uint8 would be read as a mask
        raise TypeError(f"image_index must be int64 or int32, got {describe(image_index)}")
    check_indices("image_index", image_index, n, "rows of image_embedding")


def check_fragments(
    side: str, fragments: Tensor, mask: Tensor | None, count: int, size: int | str, device: torch.device
) -> None:
    letter = "R" if side == "image" else "W"
    check_tensor(f"{side}_fragments", fragments, (count, letter, size), device=device)
    if fragments.shape[1] < 1:
        raise ValueError(f"{side}_fragments must be at least 1 wide, got {describe(fragments)}")
    if mask is not None:
        check_bool_tensor(f"{side}_mask", mask, tuple(fragments.shape[:2]), device=device)


def check_image_ids(image_ids: Tensor | None, n: int, positives: Tensor | None, device: torch.device) -> None:
    if image_ids is None:
        return
    if isinstance(image_ids, Tensor) and image_ids.dtype == torch.bool and image_ids.dim() == 2:
        raise TypeError("image_ids must be an integer tensor; give an (N, M) bool matrix of positives as positives")
    check_index_tensor("image_ids", image_ids, (n,), device=device)
    if positives is not None:
        raise ValueError("positives and image_ids both say which pairs belong together: give one of them")


def check_positives(positives: Tensor | None, n: int, m: int, device: torch.device) -> None:
    if positives is not None:
        check_bool_tensor("positives", positives, (n, m), device=device, meaning="the pair belongs together")


def pair_ids(n: int, image_ids: Tensor | None, image_index: Tensor | None, device: torch.device) -> PairIds:
    """The given ids; without any every row is an image of its own. A text has the id of the image that it describes."""
    ids = torch.arange(n, device=device) if image_ids is None else image_ids
    return PairIds(ids, ids if image_index is None else ids[image_index])


def find_positives(
    n: int, image_ids: Tensor | None, image_index: Tensor | None, positives: Tensor | None, device: torch.device
) -> Tensor:
    """(N, M) bool: the given matrix, else equal ids after indexing; without ids every row is an image of its own."""
    return pair_ids(n, image_ids, image_index, device).matrix() if positives is None else positives
