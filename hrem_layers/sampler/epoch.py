"""One epoch of NeighborBatchSampler: what its order depends on, its steps, the order, and a rank's part of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hrem_layers.sampler.arrays import Ints, no_keys, random_keys
from hrem_layers.sampler.batching import arrange
from hrem_layers.sampler.distinct import keep_distinct
from hrem_layers.sampler.layout import Layout

State = dict[str, int | bool]


@dataclass(frozen=True)
class Epoch:
    """All that an epoch's order depends on."""

    epoch: int
    seed: int
    shuffle: bool
    drop_last: bool
    images_per_cluster: int
    clusters_per_batch: int
    num_replicas: int
    captions: int
    checksum: int  # of the clusters and the captions of each image

    @property
    def slots(self) -> int:
        return self.num_replicas * self.clusters_per_batch

    @property
    def step_size(self) -> int:
        return self.slots * self.images_per_cluster

    @property
    def steps(self) -> int:
        return step_count(self.captions, self.step_size, self.num_replicas, self.drop_last)

    @property
    def _ranks_that_matter(self) -> int:
        """Steps are the same for any number of ranks, unless these are more than the left-over captions."""
        left = 0 if self.drop_last else self.captions % self.step_size
        return self.num_replicas if 0 < left < self.num_replicas else 0

    def state(self, batches_done: int) -> State:
        return {
            "epoch": self.epoch,
            "batches_done": batches_done,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "images_per_cluster": self.images_per_cluster,
            "clusters_per_step": self.slots,
            "captions": self.captions,
            "ranks_sharing_left_over": self._ranks_that_matter,
            "clusters_checksum": self.checksum,
        }

    def arrange(self, layout: Layout) -> tuple[Ints, Ints]:
        """The order of all captions, and where the steps begin and end in it."""
        draw = random_keys(self.seed, self.epoch) if self.shuffle else no_keys
        more_than_enough = self.captions + 1  # numpy has no room for larger ones, which give the same
        slots, group_size = min(self.slots, more_than_enough), min(self.images_per_cluster, more_than_enough)
        order = arrange(layout, slots, group_size, draw)
        bounds = step_bounds(self.captions, self.step_size, self.num_replicas, self.drop_last)
        # Exchanges search by chance; without shuffling by the same chance in every epoch and for every seed.
        keep_distinct(order, bounds, layout, draw if self.shuffle else random_keys(0, 0))
        return order, bounds


class EpochBatches:
    """The batches of an epoch, arranged when the first one is asked for."""

    def __init__(self, epoch: Epoch, layout: Layout) -> None:
        self.epoch, self._layout = epoch, layout

    def batch(self, step: int, rank: int) -> list[int]:
        """A list of its own at every call."""
        order, bounds = self._arranged
        low, high = rank_bounds(bounds, step, self.epoch.num_replicas, rank)
        return order[low:high].tolist()  # type: ignore[no-any-return]

    @cached_property
    def _arranged(self) -> tuple[Ints, Ints]:
        return self.epoch.arrange(self._layout)


def step_count(captions: int, step_size: int, ranks: int, drop_last: bool) -> int:
    """Steps in an epoch, see :func:`step_bounds`."""
    full, left = divmod(captions, step_size)
    if drop_last or left == 0:
        return full
    joins_last_step = full > 0 and left < ranks and step_size < 2 * ranks
    return full + (not joins_last_step)


def step_bounds(captions: int, step_size: int, ranks: int, drop_last: bool) -> Ints:
    """Where the steps begin and end in an epoch's order: (steps + 1,).

    Every step holds ``step_size`` captions. With ``drop_last=False`` the left-over captions are one more step;
    if they are fewer than the ranks, the step before it gives up as many as are missing, and if that would leave
    a rank there without any (one caption per rank), the left-over captions join that step instead.
    """
    steps = step_count(captions, step_size, ranks, drop_last)
    bounds = np.arange(steps + 1, dtype=np.int64) * min(step_size, captions)
    if steps and not drop_last:
        bounds[-1] = captions
        missing = ranks - int(bounds[-1] - bounds[-2])
        if steps > 1:
            bounds[-2] -= max(missing, 0)
    return bounds


def rank_bounds(bounds: Ints, step: int, ranks: int, rank: int) -> tuple[int, int]:
    """A rank's part of a step: contiguous, in rank order, sizes that differ by one at most."""
    start, size = int(bounds[step]), int(bounds[step + 1] - bounds[step])
    share, more = divmod(size, ranks)
    low = start + rank * share + min(rank, more)
    return low, low + share + (rank < more)
