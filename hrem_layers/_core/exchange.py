"""What a graph needs of other processes: a protocol, and ``ALONE``, which is one process.

A graph module is handed the embeddings of all processes, but the fragments of its own. It asks the exchange for
whatever else it needs, and never learns how many processes there are.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


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

    def gather_rows(self, side: str, x: Tensor) -> Tensor:
        """Results (n, ...) for this process's rows -> (N, ...) for all, for work that all processes repeat."""
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

    def gather_rows(self, side: str, x: Tensor) -> Tensor:
        return x

    def gather_pairs(self, i2t: Tensor, t2i: Tensor) -> tuple[Tensor, Tensor]:
        return i2t, t2i

    def __repr__(self) -> str:
        return "ALONE"


ALONE: Exchange = Alone()
