"""How the global batch lies over the processes: the exchange that a graph gets where there are several."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler.disable would load the whole compiler with this module

from hrem_layers._core.batch import Batch
from hrem_layers._core.exchange import Exchange
from hrem_layers.distributed.collectives import (
    add_up,
    add_up_rows,
    fetch,
    gather_constant,
    gather_replicated,
    gather_shared,
    own_rows,
    pad,
    route,
    share,
    take_own,
)

# Numbers in the fragments of others that are no burden: less is not fetched in parts.
_LEAST, _LEAST_ELSEWHERE = {"cpu": 2**21}, 2**26


class Shares(NamedTuple):
    """An :class:`hrem_layers._core.exchange.Exchange` over ``torch.distributed``."""

    image_sizes: tuple[int, ...]
    """Images of each process, in rank order."""
    text_sizes: tuple[int, ...]
    rank: int
    image_width: int
    """R of the widest process."""
    text_width: int
    image_masked: bool
    """Whether the global batch has an image mask: some process has one, or is padded."""
    text_masked: bool
    known: tuple[tuple[Tensor, Tensor], ...] = ()
    """This process's rows, each before the rows of all that were gathered of them."""

    @property
    def travels(self) -> str:
        images, texts = sum(self.image_sizes) * self.image_width, sum(self.text_sizes) * self.text_width
        return "image" if images <= texts else "text"

    def sizes(self, side: str) -> tuple[int, ...]:
        return self.image_sizes if side == "image" else self.text_sizes

    def own(self, side: str, total: int) -> slice:
        return own_rows(self.sizes(side), self.rank)

    def gather_fragments(self, side: str, fragments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        rows = gather_shared(pad(fragments, 1, self._width(side)), self.sizes(side))
        return rows, self.gather_mask(side, fragments, mask)

    @_disable_dynamo  # sizes differ between processes
    def fetch_fragments(
        self, side: str, fragments: Tensor, mask: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        wanted = index.unique()
        path = route(wanted, self.sizes(side))
        rows = fetch(pad(fragments, 1, self._width(side)), path)
        own_mask = self._padded_mask(side, fragments, mask)
        mask = None if own_mask is None else fetch(own_mask.to(torch.uint8), path).bool()
        return rows, mask, torch.searchsorted(wanted, index)

    @_disable_dynamo
    def parts(self, side: str, fragments: Tensor, index: Tensor) -> tuple[Tensor, ...] | None:
        wanted, own = index.unique(), self.own(side, 0)
        one = max(1, self._width(side) * fragments.shape[2])
        most = max((own.stop - own.start) // 4, _LEAST.get(fragments.device.type, _LEAST_ELSEWHERE) // one, 1)
        needed = torch.tensor([-(-len(wanted) // most)], device=index.device)
        number = int(gather_constant(needed, (1,) * len(self.image_sizes)).max())
        if number <= 1:
            return None
        first = int(torch.searchsorted(wanted, own.start))  # each begins with its own: at no time all ask one for all
        turned = torch.cat([wanted[first:], wanted[:first]])
        return tuple(part.sort().values for part in turned.tensor_split(number))

    def gather_rows(self, side: str, x: Tensor) -> Tensor:
        return gather_replicated(x, self.sizes(side))

    def gather_shared_rows(self, side: str, x: Tensor) -> Tensor:
        return gather_shared(x, self.sizes(side))

    def own_rows(self, side: str, x: Tensor) -> Tensor:
        for own, of_all in self.known:
            if x is of_all:
                return own
        return take_own(x, self.sizes(side))

    def share_rows(self, side: str, own: Tensor, x: Tensor) -> Tensor:
        return share(own, x, self.sizes(side))

    def remember(self, own: Tensor, x: Tensor) -> Exchange:
        return Shares(*self[:-1], known=(*self.known, (own, x)))

    def forget(self) -> Exchange:
        return Shares(*self[:-1])

    def add_up(self, x: Tensor) -> Tensor:
        return add_up(x)

    def add_up_rows(self, side: str, x: Tensor) -> Tensor:
        return add_up_rows(x, self.sizes(side))

    def gather_pairs(self, i2t: Tensor, t2i: Tensor) -> tuple[Tensor, Tensor]:
        texts_stay = self.travels == "image"
        both = torch.stack([i2t.t(), t2i] if texts_stay else [i2t, t2i.t()], dim=1)  # [own, 2, all]: one collective
        x, y = self.gather_rows("text" if texts_stay else "image", both).unbind(1)
        return (x.t(), y) if texts_stay else (x, y.t())

    def gather_mask(self, side: str, fragments: Tensor, mask: Tensor | None) -> Tensor | None:
        own = self._padded_mask(side, fragments, mask)
        return None if own is None else gather_constant(own, self.sizes(side))

    def _padded_mask(self, side: str, fragments: Tensor, mask: Tensor | None) -> Tensor | None:
        if not (self.image_masked if side == "image" else self.text_masked):
            return None
        if mask is None:
            mask = torch.ones(fragments.shape[:2], dtype=torch.bool, device=fragments.device)
        return pad(mask, 1, self._width(side))

    def _width(self, side: str) -> int:
        return self.image_width if side == "image" else self.text_width


def gather_embeddings(batch: Batch, shares: Shares) -> tuple[Batch, Exchange]:
    """The batch with the embeddings, ids and index of all processes, in rank order, for work that all of them
    repeat; fragments and masks stay this process's own. And the exchange that knows which embeddings were its own."""
    v, u = batch.image_embedding, batch.text_embedding
    if v.dtype == u.dtype and shares.image_sizes == shares.text_sizes:  # one collective for both
        v, u = gather_replicated(torch.cat([v, u], dim=1), shares.image_sizes).split(v.shape[1], dim=1)
    else:
        v, u = gather_replicated(v, shares.image_sizes), gather_replicated(u, shares.text_sizes)
    ids, index = batch.image_ids, batch.image_index
    if ids is not None:
        ids = gather_constant(ids.to(torch.long), shares.image_sizes)
    if index is not None:
        first = shares.own("image", 0).start
        index = gather_constant(index.to(torch.long) + first, shares.text_sizes)
    exchange = shares.remember(batch.image_embedding, v).remember(batch.text_embedding, u)
    return Batch(v, u, *batch[2:6], ids, index, batch.positives), exchange
