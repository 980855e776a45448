"""Where a NeighborBatchSampler is in its epochs, and one pass over an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from hrem_layers.sampler.epoch import Epoch, EpochBatches, State


@dataclass
class Position:
    """Which epoch the next iteration is of, and how many of its batches are done; shared with the iterations.

    Attributes:
        epoch, resume_at: the next iteration begins behind ``resume_at`` batches of this epoch.
        epoch_before_load: the epoch before the last loaded state.
        latest: the iteration that began last; None after a state was loaded.
    """

    epoch: int = 0
    resume_at: int = 0
    epoch_before_load: int = 0
    latest: Iteration | None = None

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self.resume_at = epoch, 0

    def load(self, epoch: int, batches_done: int) -> None:
        self.epoch_before_load = self.epoch
        self.epoch, self.resume_at, self.latest = epoch, batches_done, None

    def begin(self, iteration: Iteration) -> int:
        """Batches that are done already."""
        done, self.resume_at, self.latest = self.resume_at, 0, iteration
        return done

    def copy(self) -> Position:
        """Without the iteration, which is one of the original."""
        return Position(self.epoch, self.resume_at, self.epoch_before_load)


class Iteration(Iterator[list[int]]):
    """One pass over an epoch, with a state of its own, as StatefulDataLoader wants it.

    What to iterate over is looked up with the first batch, not before: a DataLoader with workers makes two iterators
    and uses one of them.

    Args:
        position: the sampler's, which the pass begins from.
        next_epoch: gives the batches of the epoch at ``position`` and the rank.
        load: the sampler's ``load_state_dict``.
    """

    def __init__(
        self, position: Position, next_epoch: Callable[[], tuple[EpochBatches, int]], load: Callable[[State], None]
    ) -> None:
        self._position, self._next_epoch, self._load = position, next_epoch, load
        self._epoch: Epoch | None = None  # None before the first batch
        self._batches: EpochBatches | None = None  # None, too, when all are done
        self._rank = self._done = 0

    @property
    def epoch(self) -> Epoch:
        return self._epoch or self._next_epoch()[0].epoch

    def _begin(self) -> Epoch:
        if self._epoch is None:
            self._batches, self._rank = self._next_epoch()
            self._epoch = self._batches.epoch
            self._done = self._position.begin(self)
        return self._epoch

    def __next__(self) -> list[int]:
        epoch = self._begin()
        if self._batches is None or self._done >= epoch.steps:
            self._batches = None
            raise StopIteration
        self._done += 1
        return self._batches.batch(self._done - 1, self._rank)

    def state_dict(self) -> State:
        return self.epoch.state(self._done if self._epoch else self._position.resume_at)

    def load_state_dict(self, state: State) -> None:
        # StatefulDataLoader loads when iteration starts, the sampler's own state first. After an epoch's end it then
        # starts another iteration: of the epoch that the training loop had set meanwhile, if that is a later one.
        set_meanwhile = self._position.epoch_before_load
        self._load(state)
        self._epoch = self._batches = None
        epoch = self._begin()
        if self._done == epoch.steps and set_meanwhile > epoch.epoch:
            self._position.set_epoch(set_meanwhile)


class EpochSetter:
    """``batch_sampler.sampler``, the only place where Lightning and accelerate look for ``set_epoch``."""

    def __init__(self, set_epoch: Callable[[int], None]) -> None:
        self.set_epoch = set_epoch
