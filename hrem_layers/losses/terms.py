"""A pair loss on two sets of embeddings: on their whole similarity, or streamed where that would be too large."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hrem_layers._core.batch import Batch, find_positives, pair_ids
from hrem_layers._core.checks import DTYPES, describe, said
from hrem_layers._core.exchange import ALONE, Alone, Exchange, share_gathered
from hrem_layers._core.numerics import cosine_matrix

PairLoss = Callable[[Tensor, Tensor], Tensor]
"""``(similarity (N, M), positives (N, M) bool) -> scalar``."""


class Pairs(NamedTuple):
    """Who belongs together in a batch, and whether pair losses go without the (N, M) similarity where they can."""

    batch: Batch
    streamed: bool
    exchange: Exchange = ALONE
    """Of several processes: each streams its own anchors."""

    def matrix(self) -> Tensor:
        """(N, M) bool."""
        b = self.batch
        return find_positives(
            b.image_embedding.shape[0], b.image_ids, b.image_index, b.positives, b.image_embedding.device
        )

    def loss(
        self, name: str, pair_loss: PairLoss, image: Tensor, text: Tensor, similarity: Tensor | None = None
    ) -> Tensor:
        """``pair_loss``, the caller's ``name``, of normalised rows ``image`` (N, D) and ``text`` (M, D); their
        products if the caller has them. A scalar."""
        stream: Any = getattr(pair_loss, "from_embeddings", None)
        if self.streamed and callable(stream) and not callable(getattr(pair_loss, "negative_sampling", None)):
            return self._stream(name, stream, image, text)
        similarity = cosine_matrix(image, text) if similarity is None else similarity
        return check_scalar(name, pair_loss(similarity, self.matrix()), image.device)

    def _stream(self, name: str, stream: Callable[..., object], image: Tensor, text: Tensor) -> Tensor:
        positives, exchange = self._positives(), self.exchange
        if isinstance(exchange, Alone):
            return check_scalar(name, stream(image, text, normalize=False, **positives), image.device)
        sides = ("image", image), ("text", text)
        own: dict[str, object] = {f"{side}_rows": exchange.own(side, x.shape[0]) for side, x in sides}
        if "exchange" in inspect.signature(stream).parameters:
            own["exchange"] = exchange
        else:  # of the caller's own, which finds gradients for all rows
            image, text = (share_gathered(exchange, side, x) for side, x in sides)
        return exchange.add_up(
            check_scalar(name, stream(image, text, normalize=False, **positives, **own), image.device)
        )

    def _positives(self) -> dict[str, Tensor]:
        b = self.batch
        if b.positives is not None:
            return {"positives": b.positives}
        ids = pair_ids(b.image_embedding.shape[0], b.image_ids, b.image_index, b.image_embedding.device)
        return {"image_ids": ids.image, "text_ids": ids.text}


def check_scalar(name: str, loss: object, device: torch.device) -> Tensor:
    if not isinstance(loss, Tensor) or loss.dim() or loss.dtype not in DTYPES or loss.layout != torch.strided:
        got = describe(loss) if isinstance(loss, Tensor) else said(loss)
        raise TypeError(f"{name} must return a scalar tensor, got {got}")
    if loss.device != device:
        raise ValueError(f"{name} must return a scalar on {device}, got {describe(loss)}")
    return loss
