"""Which captions make a batch: at random or by neighbourhood, in one process or several, from any batch on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import islice

import numpy as np
import processes
from pair_data import Pairs
from torch.utils.data import Sampler

from hrem_layers import NeighborBatchSampler


class RandomBatches(Sampler):
    """Captions in a random order that is a function of (seed, epoch); every process takes its part of a batch."""

    def __init__(self, captions: int, batch_size: int, *, seed: int) -> None:
        self.captions, self.batch_size, self.seed, self.epoch = captions, batch_size, seed, 0
        if captions < batch_size:
            raise ValueError(
                f"--batch-size must be at most the number of training captions, {captions}, got {batch_size}"
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.captions // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.captions)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            mine = processes.shard(self.batch_size)
            yield order[start + mine.start : start + mine.stop].tolist()


class Rest(Sampler):
    """The batches of an epoch from number ``done`` on: where a resumed run goes on."""

    def __init__(self, batches: Sampler, done: int) -> None:
        self.batches, self.done = batches, done

    def __len__(self) -> int:
        return len(self.batches) - self.done  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        return islice(iter(self.batches), self.done, None)


def make_sampler(pairs: Pairs, arguments: argparse.Namespace) -> Sampler:
    if arguments.sampler == "random":
        return RandomBatches(len(pairs.captions), arguments.batch_size, seed=arguments.seed)
    if len(pairs.captions) < arguments.batch_size:
        raise ValueError(
            f"--batch-size must be at most the number of training captions, {len(pairs.captions)}, "
            f"got {arguments.batch_size}"
        )
    per_process = arguments.batch_size // processes.count()
    means = np.empty((pairs.num_images, pairs.features.shape[2]), dtype=np.float32)
    for i in processes.progress(range(pairs.num_images), "features to cluster"):
        means[i] = pairs.image(i).mean(axis=0)
    return NeighborBatchSampler(
        means,
        clusters_per_batch=per_process // arguments.images_per_cluster,
        images_per_cluster=arguments.images_per_cluster,
        captions_per_image=pairs.captions_per_image,
        seed=arguments.seed,
        num_replicas=processes.count(),
        rank=processes.rank(),
    )
