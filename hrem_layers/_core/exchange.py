"""What a graph needs of other processes: a protocol, and ``ALONE``, which is one process.

A graph module is handed the embeddings of all processes, but the fragments of its own. It asks the exchange for
whatever else it needs, and never learns how many processes there are.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hrem_layers._core.checks import said


class Exchange(Protocol):
    """``side`` is ``"image"`` or ``"text"``; rows lie in the order of the processes.

    Example:
        >>> exchange: Exchange = ALONE
        >>> exchange.own("image", total=8)
        slice(0, 8, None)
    """

    @property
    def travels(self) -> str:
        """The side whose fragments are the cheaper ones to send: that of :meth:`gather_fragments` for all pairs."""
        ...

    def own(self, side: str, total: int) -> slice:
        """This process's rows among the ``total`` of all processes."""
        ...

    def gather_fragments(self, side: str, fragments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """This process's fragments (n, R, F) and mask -> those of all, for work that differs between processes."""
        ...

    def fetch_fragments(
        self, side: str, fragments: Tensor, mask: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Of all processes' fragments those that ``index`` names, for work that differs: fragments (C, R, F), mask and
        where each is among them, in the shape of ``index``, whose values are numbers of rows of all."""
        ...

    def parts(self, side: str, fragments: Tensor, index: Tensor) -> tuple[Tensor, ...] | None:
        """The numbers in ``index`` in as many parts on every process, each (C,) ascending, that :meth:`fetch_fragments`
        is to be asked for one after another, so that what is held at one time is a share of all; None = at once."""
        ...

    def gather_rows(self, side: str, x: Tensor) -> Tensor:
        """Results (n, ...) for this process's rows -> (N, ...) for all, for work that all processes repeat."""
        ...

    def gather_shared_rows(self, side: str, x: Tensor) -> Tensor:
        """The same for work that differs between processes: backward adds up what each of them makes of a row."""
        ...

    def own_rows(self, side: str, x: Tensor) -> Tensor:
        """This process's rows (n, ...) of ``x`` (N, ...), for work that differs. ``x`` is what :meth:`gather_rows`
        gave, changed at most row by row."""
        ...

    def share_rows(self, side: str, own: Tensor, x: Tensor) -> Tensor:
        """What :meth:`gather_shared_rows` of ``own`` (n, ...) would give, where it is here already: the values of ``x``
        (N, ...), the gradient to ``own``."""
        ...

    def remember(self, own: Tensor, x: Tensor) -> Exchange:
        """One that knows ``own`` (n, ...) as this process's rows of ``x`` (N, ...): its :meth:`own_rows` hands them
        back, and their gradient is then nowhere as large as ``x``. It holds both."""
        ...

    def forget(self) -> Exchange:
        """One that holds no rows."""
        ...

    def add_up(self, x: Tensor) -> Tensor:
        """The sum over the processes of a scalar that each has a part of."""
        ...

    def add_up_rows(self, side: str, x: Tensor) -> Tensor:
        """The sum over the processes of (N, ...) that each has a part of -> this process's rows (n, ...) of it."""
        ...

    def gather_pairs(self, i2t: Tensor, t2i: Tensor) -> tuple[Tensor, Tensor]:
        """Results for all pairs with this process's items of the side that stays -> those for all pairs.

        i2t (N, m) and t2i (m, N) where the images' fragments travelled, (n, M) and (M, n) where the texts' did.
        """
        ...


class Alone:
    """The exchange of one process: everything is here already.

    Example:
        >>> ALONE.gather_rows("text", torch.ones(2))
        tensor([1., 1.])
    """

    travels = "image"

    def own(self, side: str, total: int) -> slice:
        return slice(0, total)

    def gather_fragments(self, side: str, fragments: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return fragments, mask

    def fetch_fragments(
        self, side: str, fragments: Tensor, mask: Tensor | None, index: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        return fragments, mask, index

    def parts(self, side: str, fragments: Tensor, index: Tensor) -> tuple[Tensor, ...] | None:
        return None

    def gather_rows(self, side: str, x: Tensor) -> Tensor:
        return x

    def gather_shared_rows(self, side: str, x: Tensor) -> Tensor:
        return x

    def own_rows(self, side: str, x: Tensor) -> Tensor:
        return x

    def share_rows(self, side: str, own: Tensor, x: Tensor) -> Tensor:
        return own

    def remember(self, own: Tensor, x: Tensor) -> Exchange:
        return self

    def forget(self) -> Exchange:
        return self

    def add_up(self, x: Tensor) -> Tensor:
        return x

    def add_up_rows(self, side: str, x: Tensor) -> Tensor:
        return x

    def gather_pairs(self, i2t: Tensor, t2i: Tensor) -> tuple[Tensor, Tensor]:
        return i2t, t2i

    def __repr__(self) -> str:
        return "ALONE"


ALONE: Exchange = Alone()


def share_gathered(exchange: Exchange, side: str, x: Tensor) -> Tensor:
    """``x`` (N, ...), which ``exchange.gather_rows`` gave, for work that differs: the gradient goes to the own rows."""
    return exchange.share_rows(side, exchange.own_rows(side, x), x)


def check_exchange(name: str, exchange: object) -> None:
    if not callable(getattr(exchange, "own", None)):
        raise TypeError(f"{name} must be a hrem_layers.Exchange, ALONE for one process, got {said(exchange)}")


class Rows(NamedTuple):
    """Rows that lie over the processes, images before texts: of a graph over both, or of one modality."""

    exchange: Exchange
    totals: tuple[tuple[str, int], ...]
    """``(side, rows of all processes)``."""

    @property
    def total(self) -> int:
        """Rows of all processes."""
        return sum(total for _, total in self.totals)

    @property
    def here(self) -> int:
        """This process's."""
        return sum(self._counts())

    def owned(self) -> slice:
        """Which rows of one modality are this process's."""
        ((side, total),) = self.totals
        return self.exchange.own(side, total)

    def own(self, x: Tensor) -> Tensor:
        """This process's of ``x`` (all rows, ...), which every process has, for work that differs."""
        # of one modality x as it is, which the exchange may know
        parts = (x,) if len(self.totals) == 1 else x.split([total for _, total in self.totals])
        return _join([self.exchange.own_rows(side, part) for (side, _), part in zip(self.totals, parts, strict=True)])

    def gather(self, x: Tensor) -> Tensor:
        """``x`` (own rows, ...) -> those of all, for work that differs."""
        parts = x.split(self._counts())
        return _join(
            [self.exchange.gather_shared_rows(side, part) for (side, _), part in zip(self.totals, parts, strict=True)]
        )

    def add_up(self, x: Tensor) -> Tensor:
        """``x`` (all rows, ...), of which every process has a part -> this one's own rows of the sum."""
        parts = x.split([total for _, total in self.totals])
        return _join(
            [self.exchange.add_up_rows(side, part) for (side, _), part in zip(self.totals, parts, strict=True)]
        )

    def collect(self, x: Tensor) -> list[Tensor]:
        """``x`` (own rows, ...) -> those of all, a tensor for each side, for work that all repeat."""
        parts = x.split(self._counts())
        return [self.exchange.gather_rows(side, part) for (side, _), part in zip(self.totals, parts, strict=True)]

    def keep(self, x: Tensor, probability: float) -> Tensor:
        """Like ``x`` (own rows, ...), True with this probability. Every process draws for all rows, so that it draws
        what one process would, and as many numbers as the others."""
        drawn = torch.empty(self.total, *x.shape[1:], dtype=torch.bool, device=x.device)
        parts = drawn.bernoulli_(probability).split([total for _, total in self.totals])
        return _join(
            [part[self.exchange.own(side, total)] for (side, total), part in zip(self.totals, parts, strict=True)]
        )

    def _counts(self) -> list[int]:
        owned = (self.exchange.own(side, total) for side, total in self.totals)
        return [rows.stop - rows.start for rows in owned]


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
