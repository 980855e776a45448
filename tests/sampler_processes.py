"""What test_sampler_frameworks.py runs in processes: ``python sampler_processes.py GROUP FOLDER [RANK WORLD]``.

GROUP is torch, accelerate or lightning. Every process writes FOLDER/RANK.json, the batches that it got in each case,
by epoch; the test compares them with what the ranks should get.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

from hrem_layers import NeighborBatchSampler
from hrem_layers.sampler.clustering import cluster_features

LABELS = np.arange(94) % 7
CAPTIONS = 2 * len(LABELS)
OPTIONS = {"captions_per_image": 2, "clusters_per_batch": 3, "images_per_cluster": 4, "seed": 6}


def sampler(**options: object) -> NeighborBatchSampler:
    return NeighborBatchSampler(**{"cluster_ids": LABELS, **OPTIONS, **options})


def loader(batches: NeighborBatchSampler, **options: object) -> DataLoader:
    return DataLoader(torch.arange(CAPTIONS), batch_sampler=batches, **options)


# torch.distributed alone


def leave_together() -> None:
    """One that leaves at once would close connections that another is still making."""
    dist.barrier()
    dist.destroy_process_group()


def group_is_read(store: str, rank: int, world: int) -> list:
    early = sampler()
    assert (early.num_replicas, early.rank) == (1, 0)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    late = sampler()
    for made in (early, late):
        assert (made.num_replicas, made.rank) == (world, rank)
    assert sampler(num_replicas=1).rank == 0
    assert (sampler(num_replicas=world).rank, sampler(rank=0).num_replicas) == (rank, world)
    try:
        sampler(num_replicas=world + 1)
    except ValueError as error:
        assert f"needs rank, because torch.distributed has {world} processes" in str(error)
    else:
        raise AssertionError("which rank of world + 1?")
    assert list(early) == list(late)
    batches = list(late)
    leave_together()
    assert list(late) == batches, "a sampler made in the group knows its ranks"
    assert (early.num_replicas, late.num_replicas) == (1, world)
    return [batches]


def rank_0_clusters(store: str, rank: int, world: int) -> list:
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    features = np.random.default_rng(rank).standard_normal((94, 5)).astype(np.float32)  # not the same on the ranks
    made = sampler(image_features=features, cluster_ids=None)
    of_rank_0 = np.random.default_rng(0).standard_normal((94, 5)).astype(np.float32)
    assert np.array_equal(made.cluster_ids, cluster_features(of_rank_0, 6, seed=6))
    made.refresh(features[::-1])
    assert np.array_equal(made.cluster_ids, cluster_features(of_rank_0[::-1], 6, seed=6))
    alone = sampler(image_features=features, cluster_ids=None, num_replicas=world)
    assert np.array_equal(alone.cluster_ids, cluster_features(features, 6, seed=6)), "nothing is sent if it is given"
    if rank == 0:
        features[3, 3] = np.nan
    try:
        sampler(image_features=features, cluster_ids=None)
    except ValueError as error:
        assert "in row 3" in str(error)
    else:
        raise AssertionError("rank 0's error must reach every rank")
    leave_together()
    return [list(made)]


def too_few_for_the_group(store: str, rank: int, world: int) -> list:
    early = sampler(cluster_ids=[0], captions_per_image=world - 1, drop_last=False)
    empty = sampler(cluster_ids=[0] * 6)
    assert len(empty) == 1
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    try:
        next(iter(early))
    except ValueError as error:
        assert f"at least one caption for each of num_replicas={world}" in str(error)
    else:
        raise AssertionError("a rank without a caption")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert list(empty) == []
    assert "no batch: its 12 captions" in str(caught[0].message)
    leave_together()
    return []


# accelerate


def accelerate_shards(batches: NeighborBatchSampler, epochs: int = 2, **options: object) -> list:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
    prepared = accelerator.prepare(loader(batches))
    got = []
    for _ in range(epochs):  # set_epoch comes from accelerate
        got.append([batch.tolist() for batch in prepared])
        if options.get("even_batches", True):
            assert len(prepared) == len(got[-1])
    assert batches.epoch == epochs - 1
    return got


def accelerate_cases(rank: int, world: int) -> dict[str, list]:
    return {
        "refused": accelerate_refused(rank, world),
        "twice": accelerate_twice(rank, world),
        "plain": accelerate_shards(sampler(num_replicas=1)),
        "uneven": accelerate_shards(sampler(num_replicas=1, drop_last=False), even_batches=False),
        "even": accelerate_shards(sampler(num_replicas=1, drop_last=False), epochs=1),
        "split": accelerate_shards(sampler(num_replicas=1, clusters_per_batch=6), split_batches=True),
    }


def accelerate_refused(rank: int, world: int) -> list:
    from accelerate import Accelerator

    early = sampler()
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    for use in (sampler, lambda: next(iter(early)), lambda: len(early)):
        try:
            use()
        except ValueError as error:
            assert "Give num_replicas=1 if the DataLoader goes through prepare()" in str(error)
        else:
            raise AssertionError("would be shared out twice")
    made = sampler(num_replicas=world, rank=rank)
    return [list(made)]


def accelerate_twice(rank: int, world: int) -> list:
    """Prepared, a sampler with ranks of its own gives an error; not prepared, its part."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DataLoaderConfiguration

    got = []
    for options in ({}, {"split_batches": True}, {"dispatch_batches": True}, {"even_batches": False}):
        AcceleratorState._reset_state()
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(**options))
        made = sampler(num_replicas=world, rank=rank)
        prepared = accelerator.prepare(loader(made, num_workers=1 if not options else 0))
        try:
            next(iter(prepared))
        except ValueError as error:
            assert f"would be shared out twice: by the sampler, with num_replicas={world}, and by" in str(error)
        else:
            raise AssertionError(f"shared out twice with {options}")
        got.append([batch.tolist() for batch in loader(made)])
    return got


# Lightning starts the other processes by itself


def lightning_fits(folder: str, **options: object) -> tuple[int, dict[str, list]]:
    """One sampler is made before there is a process group, one in the hook, when there is."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, before: DataLoader) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)
            self.before = before
            self.got: dict[str, list] = {"before": [], "in the hook": []}

        def train_dataloader(self) -> list[DataLoader]:
            return [self.before, loader(sampler())]

        def on_train_epoch_start(self) -> None:
            for epochs in self.got.values():
                epochs.append([])

        def training_step(self, batch: list[torch.Tensor], _: int) -> torch.Tensor:
            for epochs, captions in zip(self.got.values(), batch, strict=True):
                epochs[-1].append(captions.tolist())
            return self.layer(batch[0][:, None].float()).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=2, default_root_dir=folder, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    module = Module(loader(sampler()))
    trainer.fit(module)
    return trainer.global_rank, module.got


def main() -> None:
    group, folder, *ranks = sys.argv[1:]
    if group == "lightning":
        rank, got = lightning_fits(folder, use_distributed_sampler=False)
    elif group == "lightning_default":
        rank, got = lightning_fits(folder)
    else:
        rank, world = map(int, ranks)
        if group == "accelerate":
            got = accelerate_cases(rank, world)
        else:
            cases = (group_is_read, rank_0_clusters, too_few_for_the_group)
            got = {case.__name__: case(f"{folder}/{case.__name__}", rank, world) for case in cases}
    Path(folder, f"{rank}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main()
