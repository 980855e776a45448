"""One epoch of NeighborBatchSampler: what its order depends on, and the order."""

from __future__ import annotations

from dataclasses import dataclass

from hrem_layers.sampler.arrays import Ints, no_keys, random_keys
from hrem_layers.sampler.batching import Layout, arrange, step_bounds, step_count
from hrem_layers.sampler.distinct import keep_distinct


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
    def step_size(self) -> int:
        return self.num_replicas * self.clusters_per_batch * self.images_per_cluster

    @property
    def steps(self) -> int:
        return step_count(self.captions, self.step_size, self.num_replicas, self.drop_last)

    @property
    def _ranks_that_matter(self) -> int:
        """Steps are the same for any number of ranks, unless these are more than the left-over captions."""
        left = 0 if self.drop_last else self.captions % self.step_size
        return self.num_replicas if 0 < left < self.num_replicas else 0

    def state(self, batches_done: int) -> dict[str, int | bool]:
        return {
            "epoch": self.epoch,
            "batches_done": batches_done,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "drop_last": self.drop_last,
            "images_per_cluster": self.images_per_cluster,
            "clusters_per_step": self.num_replicas * self.clusters_per_batch,
            "captions": self.captions,
            "ranks_sharing_left_over": self._ranks_that_matter,
            "clusters_checksum": self.checksum,
        }

    def arrange(self, layout: Layout) -> tuple[Ints, Ints]:
        slots = self.num_replicas * self.clusters_per_batch
        draw = random_keys(self.seed, self.epoch) if self.shuffle else no_keys
        order = arrange(layout, slots, self.images_per_cluster, draw)
        bounds = step_bounds(self.captions, slots * self.images_per_cluster, self.num_replicas, self.drop_last)
        # Exchanges search by chance; without shuffling by the same chance in every epoch and for every seed.
        keep_distinct(order, bounds, layout, draw if self.shuffle else random_keys(0, 0))
        return order, bounds
