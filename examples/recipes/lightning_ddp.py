"""A Lightning module under DDP, with R@K over all processes by torchmetrics.

python examples/recipes/lightning_ddp.py FOLDER --devices 2     # {train,test}_ims.npy and _caps.txt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pair_folder import Pairs, collate
from retrieval_metric import RetrievalMetric
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from hrem_layers import FragmentRelation, HREMLoss, NeighborBatchSampler


class Numbered(Dataset[tuple[int, tuple[object, ...]]]):
    """With each item its number, by which the metric knows what it has seen."""

    def __init__(self, data: Pairs) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, i: int) -> tuple[int, tuple[object, ...]]:
        return i, self.data[i]


def numbered(items: list[tuple[int, tuple[object, ...]]]) -> tuple[Tensor, ...]:
    numbers, samples = zip(*items, strict=True)
    return torch.tensor(numbers), *collate(list(samples))


class Data(lightning.LightningDataModule):
    """Batches of neighbours for training; for validation every process its share."""

    def __init__(self, folder: Path, batch_size: int, devices: int) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.train = Pairs(folder, "train")
        self.test = Pairs(folder, "test", self.train.words)
        features = torch.from_numpy(self.train.images[:].reshape(len(self.train.images), -1)).float().numpy()
        self.batches = NeighborBatchSampler(  # deals its batches out by itself: hence use_distributed_sampler=False
            features, clusters_per_batch=batch_size // 4, images_per_cluster=4,
            captions_per_image=self.train.per_image, num_clusters=max(len(features) // 64, batch_size // 4 * devices),
        )  # fmt: skip

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Numbered(self.train), batch_sampler=self.batches, collate_fn=numbered)

    def val_dataloader(self) -> DataLoader:
        several = torch.distributed.is_available() and torch.distributed.is_initialized()
        sampler = DistributedSampler(self.test, shuffle=False) if several else None
        return DataLoader(Numbered(self.test), self.batch_size, sampler=sampler, collate_fn=numbered)


class Retrieval(lightning.LightningModule):
    def __init__(self, features: int, words: int, dim: int, lr: float, warmup_steps: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.regions, self.words = nn.Linear(features, dim), nn.Embedding(words, dim, padding_idx=0)
        self.pool_regions, self.pool_words = FragmentRelation(dim), FragmentRelation(dim)
        self.loss = HREMLoss(dim, warmup_steps=warmup_steps, gather_distributed=True)
        self.metric = RetrievalMetric()

    def encode(self, regions: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        image_fragments, text_fragments, words = self.regions(regions), self.words(tokens), tokens != 0
        return (
            self.pool_regions(image_fragments), self.pool_words(text_fragments, words),
            image_fragments, text_fragments, words,
        )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, ...], _: int) -> Tensor:
        _, image_ids, regions, tokens, _ = batch
        v, u, image_fragments, text_fragments, words = self.encode(regions, tokens)
        terms = self.loss.terms(v, u, image_fragments, text_fragments, text_mask=words, image_ids=image_ids)
        self.log_dict({f"train/{name}": value for name, value in terms._asdict().items()})
        return terms.total

    def validation_step(self, batch: tuple[Tensor, ...], _: int) -> None:
        caption_ids, image_ids, regions, tokens, _ = batch
        v, u, *_ = self.encode(regions, tokens)
        self.metric.update(v, u, image_ids, caption_ids)

    def on_validation_epoch_end(self) -> None:
        found = self.metric.compute()  # the same everywhere; Lightning would warn without sync_dist
        self.log_dict({f"val/{name}": value for name, value in found.items()}, sync_dist=True)
        self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--strategy", default="ddp", help="in a notebook: ddp_notebook")
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--dim", type=int, default=256, help="a multiple of 16")
    parser.add_argument("--batch-size", type=int, default=64, help="per process, a multiple of 4")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/lightning"))
    options = parser.parse_args(argv)
    if options.batch_size < 4 or options.batch_size % 4:
        parser.error(f"--batch-size must be a multiple of 4, the images of a neighbourhood, got {options.batch_size}")

    lightning.seed_everything(0)
    data = Data(options.folder, options.batch_size, options.devices)
    model = Retrieval(data.train.images.shape[-1], len(data.train.words), options.dim, options.lr, options.warmup_steps)
    trainer = lightning.Trainer(
        accelerator=options.accelerator, devices=options.devices, max_epochs=options.epochs,
        strategy=options.strategy if options.devices > 1 else "auto", use_distributed_sampler=False,
        callbacks=[ModelCheckpoint(monitor="val/rsum", mode="max")], default_root_dir=options.output_dir,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(model, data)
    found = float(trainer.callback_metrics["val/rsum"])
    if trainer.is_global_zero:
        print(f"rSum {found:.1f}")
    return found


if __name__ == "__main__":
    main()
