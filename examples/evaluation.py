"""R@K of a split by one checkpoint or by several together, and what the final evaluation leaves behind."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import picture
import processes
import report
import torch
from data_files import is_there, load_array, misfit
from pair_data import Captions, Images, Pairs, loader_options, pad
from retrieval_model import Built, RetrievalModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hrem_layers.retrieval import RetrievalMetrics, retrieval_metrics


def amp_dtype(arguments: argparse.Namespace) -> torch.dtype:
    return torch.float16 if arguments.amp == "fp16" else torch.bfloat16


class Evaluated(NamedTuple):
    metrics: RetrievalMetrics
    images: Tensor  # [images, d], embeddings
    texts: Tensor  # [captions, d]


@torch.no_grad()
def evaluate(
    model: RetrievalModel,
    pairs: Pairs,
    built: Built,
    arguments: argparse.Namespace,
    device: torch.device,
    what: str,
) -> Evaluated:
    """R@K of one split, and the embeddings it is computed from. Each process encodes its share.

    Raises:
        ValueError: an embedding is not finite.
    """
    model.eval()

    def encode(items: Any, encoder: nn.Module, name: str) -> Tensor:
        mine = processes.shard(len(items))
        loader = DataLoader(
            torch.utils.data.Subset(items, mine), batch_size=arguments.batch_size, collate_fn=pad,
            **loader_options(arguments, device),
        )  # fmt: skip
        rows = [torch.zeros(0, arguments.embed_dim)]
        for batch, mask in processes.progress(loader, f"{what}: {name}"):
            with torch.autocast(device.type, amp_dtype(arguments), enabled=arguments.amp != "none"):
                rows.append(encoder(batch.to(device), mask.to(device))[0].float().cpu())
        embeddings = processes.gather_shards(torch.cat(rows), len(items))
        if not embeddings.isfinite().all():
            raise ValueError(f"{what}: the encoder gives {name} embeddings that are not finite")
        return embeddings

    images = encode(Images(pairs), model.image_encoder, "images")
    texts = encode(Captions(pairs, built.encode), model.text_encoder, "captions")
    return of_embeddings(images, texts, pairs)


def of_embeddings(images: Tensor, texts: Tensor, pairs: Pairs) -> Evaluated:
    metrics = retrieval_metrics(images, texts, captions_per_image=pairs.captions_per_image)
    return Evaluated(metrics, images, texts)


def together(members: Sequence[Evaluated], pairs: Pairs) -> Evaluated:
    """By the mean of the members' similarities, as the field reports ensembles.

    The cosine of normalised embeddings put side by side is the mean of their cosines.
    """
    images, texts = (
        torch.cat([nn.functional.normalize(getattr(member, side), dim=1) for member in members], dim=1)
        for side in ("images", "texts")
    )
    return of_embeddings(images, texts, pairs)


# ---------------------------------------------------------------------------------------- the final one


def read_pictures(data: Path, split: str, pairs: Pairs) -> np.ndarray | None:
    """(images, H, W, 3) uint8, on disk, if the folder has any."""
    path = data / f"{split}_pictures.npy"
    if not is_there(path):
        return None
    pictures = load_array(path, mmap_mode="r")
    n = pairs.num_images
    if pictures.ndim != 4 or len(pictures) != n or pictures.shape[3] != 3 or pictures.dtype != np.uint8:
        raise misfit(path, f"uint8 of shape ({n}, height, width, 3)", f"{pictures.dtype} {pictures.shape}")
    return pictures


def check_test_split(arguments: argparse.Namespace, pairs: Pairs) -> None:
    """Raises ValueError if the final evaluation would."""
    if arguments.five_fold and pairs.num_images < 5:
        raise ValueError(f"--five-fold: expected at least 5 images in the test split, found {pairs.num_images}")


def final_evaluation(
    arguments: argparse.Namespace, pairs: Pairs, evaluated: Evaluated, folder: Path, data: Path, state: dict[str, Any],
    whose: str, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """The table, metrics.json, the picture and, where asked for, the embeddings, by the main process."""
    if not processes.is_main():
        return
    metrics, split = evaluated.metrics, arguments.test_split
    chance = report.chance(pairs)
    content: dict[str, Any] = {
        "split": split, "images": pairs.num_images, "captions": len(pairs.captions),
        "test": metrics.as_dict(), "chance": chance, "best_epoch": state["sampler"]["epoch"],
        "best_dev_rsum": state["rsum"], "history": state["history"], "run_id": state["run_id"],
        "arguments": state["arguments"], "versions": {"python": sys.version.split()[0], "torch": torch.__version__},
        **(more or {}),
    }  # fmt: skip
    print(f"\n{split}: {pairs.num_images} images, {len(pairs.captions)} captions; {whose}")
    print(metrics.table())
    print(f"chance: R@1 {chance['i2t_r1']:.2f} image to text, {chance['t2i_r1']:.2f} text to image")
    if arguments.five_fold:
        folds = retrieval_metrics(
            evaluated.images, evaluated.texts, captions_per_image=pairs.captions_per_image, folds=5
        )
        content["five_fold"] = folds.as_dict()
        print(f"\nmean over five folds\n{folds.table()}")
    names = ["metrics.json", "report.png", "best.pt", "last.pt", "tensorboard"]
    report.write_json(folder / "metrics.json", content)
    if arguments.save_embeddings:
        names += report.save_embeddings(folder, split, evaluated.images, evaluated.texts)
    options = state["arguments"]
    picture.draw(
        folder / "report.png", state["history"], pairs, evaluated.images, evaluated.texts, metrics,
        read_pictures(data, split, pairs), attribution=report.attribution(data),
        warmup_steps=0 if options["mechanism"] == "none" else options["warmup_steps"],
    )  # fmt: skip
    if (folder / "tensorboard").is_dir() and not arguments.eval_only:
        report.add_to_tensorboard(folder / "tensorboard", folder / "report.png", options, metrics.as_dict())
    left = [name for name in names if (folder / name).exists()]
    print(f"\nwritten to {folder}: {', '.join(left)}", flush=True)
