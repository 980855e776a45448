"""What a run leaves behind: the table, metrics.json and a picture."""

from __future__ import annotations

import json
import os
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pair_data import Pairs
from torch import Tensor

from hrem_layers.retrieval import RetrievalMetrics


def chance(pairs: Pairs) -> dict[str, float]:
    """R@1 in percent of a ranking at random: image to text, text to image."""
    n, k = pairs.num_images, pairs.captions_per_image
    return {"i2t_r1": 100 * k / (n * k), "t2i_r1": 100 / n}


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, path)


def top_captions(image_embedding: Tensor, text_embedding: Tensor, images: list[int], k: int = 5) -> list[list[int]]:
    """The k captions most similar to each of ``images``."""
    similarity = (
        torch.nn.functional.normalize(image_embedding[images], dim=1)
        @ torch.nn.functional.normalize(text_embedding, dim=1).t()
    )
    return similarity.topk(min(k, similarity.shape[1]), dim=1).indices.tolist()


def draw(
    path: Path,
    history: list[dict[str, Any]],
    pairs: Pairs,
    images: list[int],
    retrieved: list[list[int]],
    metrics: RetrievalMetrics,
    pictures: np.ndarray | None,
) -> None:
    """Training curves above, a handful of images with the captions retrieved below; right ones green and ticked.

    ``history``: a dict an epoch with ``loss``, ``base_loss`` and the dev recalls. ``pictures`` (n, H, W, 3) uint8,
    or None where the data holds features only: then an image is shown by its number.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "hrem-layers[examples]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 2
    rows = -(-len(images) // columns)
    figure = plt.figure(figsize=(14, 4.2 + 1.6 * rows), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[4.2, 1.6 * rows])
    left, right = above.subplots(1, 2)
    epochs = [entry["epoch"] for entry in history]
    left.plot(epochs, [entry["loss"] for entry in history], label="all terms (from the end of the warm-up on)")
    left.plot(epochs, [entry["base_loss"] for entry in history], label="plain embeddings")
    left.set(xlabel="epoch", ylabel="training loss, mean over steps", ylim=(0, None))
    left.legend(fontsize="small")
    for name, label, colour in (("i2t", "image to text", "tab:blue"), ("t2i", "text to image", "tab:orange")):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            recalls = [entry["dev"][f"{name}_r{k}"] for entry in history]
            right.plot(epochs, recalls, style, color=colour, label=f"{label} R@{k}")
    right.set(xlabel="epoch", ylabel="recall on dev, %", ylim=(0, 100))
    right.legend(fontsize="small", ncols=2)
    for axes in (left, right):
        axes.xaxis.get_major_locator().set_params(integer=True)

    figure.suptitle(
        f"Test: R@1 image to text {metrics.i2t.r1:.1f}, text to image {metrics.t2i.r1:.1f}, rSum {metrics.rsum:.1f}"
    )
    grid = below.subplots(rows, 2 * columns, width_ratios=[1, 5] * columns, squeeze=False).reshape(-1, 2)
    for axes in grid.flat:
        axes.axis("off")
    for (picture, text), image, captions in zip(grid, images, retrieved, strict=False):
        if pictures is None:
            picture.text(0.5, 0.5, f"image {image}", ha="center", va="center")
        else:
            picture.imshow(pictures[image])
        for place, caption in enumerate(captions):
            right_one = caption // pairs.captions_per_image == image
            text.text(
                0, 0.9 - 0.2 * place,
                f"{'✓' if right_one else '✗'} {textwrap.shorten(pairs.captions[caption], 75)}",
                color="tab:green" if right_one else "tab:red", va="center",
            )  # fmt: skip
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=110)
    plt.close(figure)
    os.replace(partial, path)
