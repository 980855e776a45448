"""What a run leaves behind: the table, metrics.json and a picture."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoint import replacing
from pair_data import Pairs
from torch import Tensor

from hrem_layers.retrieval import RetrievalMetrics


def chance(pairs: Pairs) -> dict[str, float]:
    """R@1 in percent of a ranking at random: image to text, text to image."""
    n, k = pairs.num_images, pairs.captions_per_image
    return {"i2t_r1": 100 * k / (n * k), "t2i_r1": 100 / n}


def write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def top_captions(image_embedding: Tensor, text_embedding: Tensor, images: list[int], k: int = 5) -> list[list[int]]:
    """The k captions most similar to each of ``images``."""
    similarity = (
        torch.nn.functional.normalize(image_embedding[images], dim=1)
        @ torch.nn.functional.normalize(text_embedding, dim=1).t()
    )
    return similarity.topk(min(k, similarity.shape[1]), dim=1).indices.tolist()


def draw_losses(axes: Any, history: list[dict[str, Any]], warmup_steps: int) -> None:
    """The plain term and the relational ones apart: their sum would seem to explode where the warm-up ends."""
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["base_loss"] for entry in history], marker=".", label="plain embeddings")
    if any(entry["relational_loss"] for entry in history):
        axes.plot(epochs, [entry["relational_loss"] for entry in history], "--", marker=".", label="relations")
    if warmup_steps and history:  # the point of epoch e is the mean over its steps, from e - 1/2 to e + 1/2
        end = 0.5 + warmup_steps / history[0]["steps"]
        axes.axvspan(0.5, min(end, epochs[-1] + 0.5), color="0.9", label="warm-up: relations do not count")
    axes.set(xlabel="epoch", ylabel="training loss, mean over steps", ylim=(0, None))
    axes.legend(fontsize="small")


def draw(
    path: Path,
    history: list[dict[str, Any]],
    pairs: Pairs,
    images: list[int],
    retrieved: list[list[int]],
    metrics: RetrievalMetrics,
    pictures: np.ndarray | None,
    *,
    warmup_steps: int = 0,
) -> None:
    """Training curves above, a handful of images with the captions retrieved below; right ones green and ticked.

    ``history``: a dict per epoch with ``loss``, ``base_loss``, ``relational_loss``, ``steps`` and the dev recalls.
    ``pictures`` (n, H, W, 3) uint8, or None where the data holds features only: then an image is shown by its number.
    ``warmup_steps``: of the run; shaded, as the relational terms do not count there.
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
    draw_losses(left, history, warmup_steps)
    for name, label, colour in (("i2t", "image to text", "tab:blue"), ("t2i", "text to image", "tab:orange")):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            recalls = [entry["dev"][f"{name}_r{k}"] for entry in history]
            right.plot(epochs, recalls, style, marker=".", color=colour, label=f"{label} R@{k}")
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
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=110)
    finally:
        plt.close(figure)
