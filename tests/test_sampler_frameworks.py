"""NeighborBatchSampler in torch.distributed, torchdata, accelerate and Lightning; several processes are real ones."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).with_name("sampler_processes.py")
_spec = importlib.util.spec_from_file_location("sampler_processes", SCRIPT)
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)
sampler, loader, CAPTIONS = processes.sampler, processes.loader, processes.CAPTIONS

needs_gloo = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
Batches = list[list[int]]


def expected(epoch: int, **options: object) -> Batches:
    made = sampler(**options)
    made.set_epoch(epoch)
    return list(made)


@functools.cache
def run(group: str, folder: Path, world: int = 2) -> list[dict[str, list[Batches]]]:
    """By rank, what each case got: batches by epoch."""
    folder = Path(tempfile.mkdtemp(prefix=f"sampler-{group}-", dir=folder))  # after a failure it runs again
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    base = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, str(SCRIPT), group, str(folder)]
    starts = [(command, base)]  # Lightning starts the others
    if "lightning" not in group:
        starts = [
            ([*command, rank, str(world)], {**base, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(world)})
            for rank in map(str, range(world))
        ]  # fmt: skip
    started = [
        subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for arguments, environment in starts
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    failed = [output for process, output in zip(started, outputs, strict=True) if process.returncode]
    if failed:
        raise RuntimeError("\n".join(output[-5000:] for output in failed))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]


@pytest.fixture
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.getbasetemp()


# torch.distributed


@needs_gloo
def test_ranks_come_from_the_group_whenever_it_was_made(base_folder: Path) -> None:
    by_rank = [got["group_is_read"] for got in run("torch", base_folder, 3)]
    assert by_rank == [[expected(0, num_replicas=3, rank=rank)] for rank in range(3)]


@needs_gloo
def test_rank_0_clusters_for_all(base_folder: Path) -> None:
    """And its errors reach all; the process itself checks that."""
    by_rank = [got["rank_0_clusters"][0] for got in run("torch", base_folder, 3)]
    seen = Counter(caption for batches in by_rank for batch in batches for caption in batch)
    assert max(seen.values()) == 1 and len(seen) == 5 * 36


@needs_gloo
def test_what_the_group_makes_impossible_is_said(base_folder: Path) -> None:
    """The processes check it."""
    assert [got["too_few_for_the_group"] for got in run("torch", base_folder, 3)] == [[]] * 3


# torchdata


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [True, False])
def test_stateful_data_loader_goes_on_in_mid_epoch(workers: int, drop_last: bool) -> None:
    """From any batch, in a new sampler and loader; then the next epochs come whole."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")

    def make() -> tuple[object, object]:
        batches = sampler(drop_last=drop_last)
        return batches, torchdata.StatefulDataLoader(torch.arange(CAPTIONS), batch_sampler=batches, num_workers=workers)

    whole = [expected(epoch, drop_last=drop_last) for epoch in range(4)]
    batches, data = make()
    batches.set_epoch(1)
    states = [data.state_dict()]  # before the first batch
    got = []
    for batch in data:
        got.append(batch.tolist())
        states.append(data.state_dict())
    assert got == whole[1]
    assert len(states) == len(got) + 1
    for done in range(0, len(states), 1 if workers == 0 else 4):
        batches, data = make()
        data.load_state_dict(states[done])
        # a training loop may say again which epoch it is, or leave it to the state, which knows better in mid-epoch
        if done % 3:
            batches.set_epoch(1 if done % 3 == 1 or done == len(got) else 3)
        assert [batch.tolist() for batch in data] == whole[1][done:]
        assert batches.epoch == 1
        batches.set_epoch(2)
        assert [batch.tolist() for batch in data] == whole[2]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("epoch", [1, 2])
def test_stateful_data_loader_begins_anew_after_an_epoch(workers: int, epoch: int) -> None:
    """Of the epoch that the training loop sets, although the state, which is of epoch 1, is loaded after that."""
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    made = [sampler(), sampler()]
    before, after = (
        torchdata.StatefulDataLoader(torch.arange(CAPTIONS), batch_sampler=batches, num_workers=workers)
        for batches in made
    )
    made[0].set_epoch(1)
    list(before)
    after.load_state_dict(before.state_dict())
    made[1].set_epoch(epoch)
    assert [batch.tolist() for batch in after] == expected(epoch)
    assert made[1].epoch == epoch
    made[1].set_epoch(3)
    assert [batch.tolist() for batch in after] == expected(3)


def test_stateful_data_loader_with_persistent_workers() -> None:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    batches = sampler()
    data = torchdata.StatefulDataLoader(
        torch.arange(CAPTIONS), batch_sampler=batches, num_workers=1, persistent_workers=True
    )
    for epoch in range(3):
        batches.set_epoch(epoch)
        assert [batch.tolist() for batch in data] == expected(epoch)


# accelerate, which shares out the batches of a sampler itself


def accelerate(case: str, folder: Path) -> list[list[Batches]]:
    pytest.importorskip("accelerate")
    return [got[case] for got in run("accelerate", folder)]


def in_order(by_rank: list[list[Batches]], epoch: int) -> Batches:
    """The batches in the order in which the sampler gave them: step by step, rank by rank."""
    ranks = [rank[epoch] for rank in by_rank]
    return [rank[step] for step in range(len(ranks[0])) for rank in ranks if step < len(rank)]


@needs_gloo
def test_accelerate_shares_out_once_and_sets_the_epoch(base_folder: Path) -> None:
    by_rank = accelerate("plain", base_folder)
    for epoch in range(2):
        batches = expected(epoch)
        assert len(batches) == 15
        assert in_order(by_rank, epoch) == batches[:14]


@needs_gloo
def test_accelerate_without_even_batches_gives_every_caption_once(base_folder: Path) -> None:
    by_rank = accelerate("uneven", base_folder)
    for epoch in range(2):
        assert sorted(chain.from_iterable(in_order(by_rank, epoch))) == list(range(CAPTIONS))


@needs_gloo
def test_accelerate_with_even_batches_repeats_captions_as_the_docs_warn(base_folder: Path) -> None:
    seen = Counter(chain.from_iterable(in_order(accelerate("even", base_folder), 0)))
    twice = {caption for caption, times in seen.items() if times > 1}
    assert len(seen) == CAPTIONS
    assert twice and twice <= set(chain.from_iterable(expected(0, drop_last=False)[:2]))


@needs_gloo
def test_accelerate_with_split_batches_keeps_images_apart_over_the_ranks(base_folder: Path) -> None:
    by_rank = accelerate("split", base_folder)
    for epoch in range(2):
        steps = [list(chain.from_iterable(parts)) for parts in zip(*(rank[epoch] for rank in by_rank), strict=True)]
        assert steps == expected(epoch, clusters_per_batch=6)
        assert all(len({caption // 2 for caption in step}) == 24 for step in steps)


@needs_gloo
def test_accelerate_with_a_sampler_that_would_share_out_too_is_refused(base_folder: Path) -> None:
    by_rank = accelerate("refused", base_folder)
    assert by_rank == [[expected(0, num_replicas=2, rank=rank)] for rank in range(2)]


@needs_gloo
def test_accelerate_does_not_share_out_again_what_the_sampler_has(base_folder: Path) -> None:
    """However it shares out; the processes check the error. Without ``prepare`` the ranks are the sampler's."""
    by_rank = accelerate("twice", base_folder)
    assert by_rank == [[expected(0, num_replicas=2, rank=rank)] * 4 for rank in range(2)]


# Lightning, which puts a distributed sampler into every loader unless told not to


@needs_gloo
@pytest.mark.parametrize("made", ["before", "in the hook"])
def test_lightning(made: str, base_folder: Path) -> None:
    """The epoch is set through ``.sampler``; the ranks are read when the group is there."""
    pytest.importorskip("lightning")
    by_rank = [got[made] for got in run("lightning", base_folder)]
    assert by_rank == [[expected(epoch, num_replicas=2, rank=rank) for epoch in range(2)] for rank in range(2)]


@needs_gloo
def test_lightning_with_its_distributed_sampler_says_what_to_do(base_folder: Path) -> None:
    pytest.importorskip("lightning")
    with pytest.raises(
        RuntimeError, match=r"TypeError: NeighborBatchSampler .*Trainer\(use_distributed_sampler=False\)"
    ):
        run("lightning_default", base_folder)


def lightning_in_this_process(what: str, batches: object, folder: Path, **options: object) -> Batches:
    """What one device gets of ``Trainer.fit`` (2 epochs), ``validate``, ``test`` or ``predict``."""
    lightning = pytest.importorskip("lightning")
    got: Batches = []

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
            got.append(batch.tolist())
            return self.layer(batch[:, None].float()).mean()

        def test_step(self, batch: torch.Tensor, _: int) -> None:
            got.append(batch.tolist())

        predict_step = validation_step = test_step

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=folder, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, **options,
    )  # fmt: skip
    getattr(trainer, what)(Module(), loader(batches))
    return got


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
@pytest.mark.parametrize("what", ["validate", "test", "fit"])
def test_lightning_on_one_device(what: str, use_distributed_sampler: bool, tmp_path: Path) -> None:
    got = lightning_in_this_process(what, sampler(), tmp_path, use_distributed_sampler=use_distributed_sampler)
    assert got == expected(0) + (expected(1) if what == "fit" else [])


@pytest.mark.parametrize("use_distributed_sampler", [True, False])
def test_lightning_predict_says_what_to_do(use_distributed_sampler: bool, tmp_path: Path) -> None:
    """It rebuilds the batch sampler whatever the option says."""
    with pytest.raises(TypeError, match=r"Trainer\.predict rebuilds every sampler: give it a DataLoader without"):
        lightning_in_this_process("predict", sampler(), tmp_path, use_distributed_sampler=use_distributed_sampler)


@pytest.mark.parametrize("shuffle", [True, False])
def test_lightning_overfits_on_the_same_batches_only_without_shuffling(shuffle: bool, tmp_path: Path) -> None:
    """As the docs say: with it, on the first batches of each epoch."""
    got = lightning_in_this_process("fit", sampler(shuffle=shuffle), tmp_path, overfit_batches=2)
    assert got == expected(0, shuffle=shuffle)[:2] + expected(1, shuffle=shuffle)[:2]
    assert (got[:2] == got[2:]) is not shuffle
