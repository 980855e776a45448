"""The picture of a run: how it was trained, how far it got, and what it finds, right and wrong, in both directions."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from checkpoint import replacing
from pair_data import Pairs
from torch import Tensor

from hrem_layers.retrieval import RetrievalMetrics

IMAGES, TEXTS = "#0072B2", "#D55E00"  # blue and vermilion: told apart by colour-blind eyes too
# Only few of the many answers can be right, however good the encoders are: those stand out, and the others stay grey.
RIGHT, WRONG = IMAGES, "0.45"
CHUNK = 256  # queries whose similarities are held at a time
CAPTIONS_SHOWN, IMAGES_SHOWN = 3, 6


class Found(NamedTuple):
    """Of each query: where its first right answer stands (1 = first), and the best answers."""

    positions: np.ndarray  # [q] int64, from 1
    best: np.ndarray  # [q, k] int64


@torch.no_grad()
def find(queries: Tensor, answers: Tensor, query_ids: Tensor, answer_ids: Tensor, k: int) -> Found:
    """By cosine; equal ids are right answers. Chunk by chunk: never all similarities at once."""
    answers = torch.nn.functional.normalize(answers, dim=1)
    positions, best = [], []
    for rows, ids in zip(queries.split(CHUNK), query_ids.split(CHUNK), strict=True):
        similarity = torch.nn.functional.normalize(rows, dim=1) @ answers.t()
        own = similarity.masked_fill(ids.unsqueeze(1) != answer_ids, -torch.inf).amax(dim=1, keepdim=True)
        positions.append(1 + (similarity > own).sum(dim=1))
        best.append(similarity.topk(min(k, len(answers)), dim=1).indices)
    return Found(torch.cat(positions).numpy(), torch.cat(best).numpy())


def choose(positions: np.ndarray, each: int = 2, seed: int = 0) -> list[tuple[str, int]]:
    """``each`` queries of the best, of the median and of the worst positions, drawn among equal ones at random."""
    order = np.random.default_rng(seed).permutation(len(positions))
    order = order[np.argsort(positions[order], kind="stable")]
    middle = max(0, (len(order) - each) // 2)
    parts = {"best": order[:each], "typical": order[middle : middle + each], "worst": order[-each:]}
    return [(name, int(query)) for name, chosen in parts.items() for query in chosen]


def draw(
    path: Path,
    history: list[dict[str, Any]],
    pairs: Pairs,
    images: Tensor,
    texts: Tensor,
    metrics: RetrievalMetrics,
    pictures: np.ndarray | None,
    *,
    warmup_steps: int = 0,
    attribution: str = "",
) -> None:
    """Writes the picture to ``path``.

    Args:
        history: a dict per epoch with ``loss``, ``base_loss``, ``relational_loss``, ``steps`` and the dev recalls.
        images, texts: (n, d) and (m, d), the embeddings of ``pairs``.
        pictures: (n, H, W, 3) uint8, or None where the data holds features only: then an image is its number.
        warmup_steps: of the run; shaded, as the relational terms do not count there.
        attribution: whose the pictures are; stands at the bottom.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('the picture needs matplotlib: pip install "hrem-layers[examples]"') from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    image_ids = torch.from_numpy(pairs.ids)
    text_ids = image_ids.repeat_interleave(pairs.captions_per_image)
    to_text = find(images, texts, image_ids, text_ids, CAPTIONS_SHOWN)
    to_image = find(texts, images, text_ids, image_ids, IMAGES_SHOWN)
    figure = plt.figure(figsize=(14, 17.5), layout="constrained")
    figure.suptitle(
        f"{len(images)} images and {len(texts)} captions that training never saw\nthe right answer comes first for "
        f"{metrics.i2t.r1:.0f}% of the images and {metrics.t2i.r1:.0f}% of the captions "
        f"(at random: {100 / len(images):.1f}%)",
        fontsize=13, weight="bold",
    )  # fmt: skip
    above, left, right, below = figure.subfigures(4, 1, height_ratios=[3.6, 6.4, 6.4, 0.35])
    curves = above.subplots(1, 3)
    draw_losses(curves[0], history, warmup_steps)
    sizes = [entry["dev_images"] for entry in history if "dev_images" in entry]  # older checkpoints do not say
    draw_recalls(curves[1], history, chance=100 / sizes[0] if sizes else None)
    draw_positions(curves[2], to_text, to_image, len(images), len(texts))
    show_captions(left, pairs, to_text, pictures)
    show_images(right, pairs, to_image, text_ids.numpy(), pictures)
    below.text(0.5, 0.5, attribution, ha="center", va="center", fontsize=8, color="0.3")
    try:
        with replacing(path) as partial:
            figure.savefig(partial, dpi=100)
    finally:
        plt.close(figure)


def draw_losses(axes: Any, history: list[dict[str, Any]], warmup_steps: int) -> None:
    """The plain term and the relational ones apart: their sum would seem to explode where the warm-up ends."""
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["base_loss"] for entry in history], marker=".", color=IMAGES, label="plain embeddings")
    relational = [entry["relational_loss"] or np.nan for entry in history]  # 0: not computed, in the warm-up
    if not np.isnan(relational).all():
        axes.plot(epochs, relational, "--", marker=".", color=TEXTS, label="relations")
    if warmup_steps and history:  # the point of epoch e is the mean over its steps, from e - 1/2 to e + 1/2
        end = 0.5 + warmup_steps / history[0]["steps"]
        axes.axvspan(0.5, min(end, epochs[-1] + 0.5), color="0.9", label="warm-up: no relations yet")
    axes.set(title="training loss", xlabel="epoch", ylabel="mean over steps", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="small")


def draw_recalls(axes: Any, history: list[dict[str, Any]], chance: float | None) -> None:
    epochs = [entry["epoch"] for entry in history]
    for name, label, colour in (("i2t", "image to text", IMAGES), ("t2i", "text to image", TEXTS)):
        for k, style in ((1, "-"), (5, "--"), (10, ":")):
            recalls = [entry["dev"][f"{name}_r{k}"] for entry in history]
            axes.plot(epochs, recalls, style, marker=".", color=colour, label=f"{label} R@{k}")
    if chance is not None:
        axes.axhline(chance, color="0.4", linewidth=1, label="R@1 at random")
    axes.set(title="recall on dev, by which the epoch is chosen", xlabel="epoch", ylabel="%", ylim=(0, 100))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(fontsize="x-small", ncols=2)


def draw_positions(axes: Any, to_text: Found, to_image: Found, images: int, texts: int) -> None:
    """R@K for every K, and what a random order gives."""
    k = np.unique(np.geomspace(1, images, 60).astype(int))
    for found, label, colour in ((to_text, "image to text", IMAGES), (to_image, "text to image", TEXTS)):
        axes.plot(k, [100 * np.mean(found.positions <= j) for j in k], color=colour, label=label)
    axes.plot(k, 100 * k / images, color="0.4", linewidth=1, label="text to image at random")
    if texts > images:  # the first of c right ones among all: one minus the chance that all of them stand behind K
        missed = (1 - k / texts) ** (texts // images)
        axes.plot(k, 100 * (1 - missed), ":", color="0.4", linewidth=1, label="image to text at random")
    axes.set(title="on test: a right answer among the first K", xscale="log", xlabel="K", ylabel="%", ylim=(0, 100))
    axes.legend(fontsize="small")


def show_captions(figure: Any, pairs: Pairs, found: Found, pictures: np.ndarray | None) -> None:
    """Images as queries: a true caption, and the captions found."""
    figure.suptitle("From an image to its caption", fontsize=12, weight="bold")
    chosen = choose(found.positions)
    grid = figure.subplots(-(-len(chosen) // 2), 4, width_ratios=[1, 4.2] * 2, squeeze=False).reshape(-1, 2)
    for axes in grid.flat:
        axes.axis("off")
    owner = np.repeat(pairs.ids, pairs.captions_per_image)
    for (picture, text), (kind, image) in zip(grid, chosen, strict=False):
        show(picture, image, pictures)
        first = image * pairs.captions_per_image
        lines = [(f"{kind}: first right caption at position {found.positions[image]} of {len(pairs.captions)}", "0.4")]
        lines.append((f"true:  {pairs.captions[first]}", "black"))
        for caption in found.best[image]:
            is_right = owner[caption] == pairs.ids[image]
            mark, colour = ("✓ right:", RIGHT) if is_right else ("✗ wrong:", WRONG)
            lines.append((f"{mark}  {pairs.captions[caption]}", colour))
        for place, (line, colour) in enumerate(lines):
            text.text(
                0, 0.92 - 0.21 * place, textwrap.shorten(line, 84, placeholder=" ..."), color=colour, va="center",
                fontsize=9.5, style="italic" if place == 0 else "normal",
            )  # fmt: skip


def show_images(figure: Any, pairs: Pairs, found: Found, text_ids: np.ndarray, pictures: np.ndarray | None) -> None:
    """Captions as queries: the true image, and the images found."""
    figure.suptitle(
        "From a caption to its image (black: the true one; then the answers; right: blue)", fontsize=12, weight="bold"
    )
    chosen = choose(found.positions)
    parts = figure.subfigures(len(chosen), 1)
    for part, (kind, caption) in zip(np.atleast_1d(parts), chosen, strict=True):
        grid = part.subplots(1, IMAGES_SHOWN + 2, width_ratios=[4.6, *[1] * (IMAGES_SHOWN + 1)])
        for axes in grid:
            axes.set(xticks=[], yticks=[])
        grid[0].axis("off")
        where = f"{kind}: right image at position {found.positions[caption]} of {pairs.num_images}"
        grid[0].text(0, 0.85, where, color="0.4", style="italic", fontsize=9.5, va="center")
        said = textwrap.fill(textwrap.shorten(pairs.captions[caption], 110, placeholder=" ..."), 58)
        grid[0].text(0, 0.4, said, fontsize=9.5, va="center")
        show(grid[1], caption // pairs.captions_per_image, pictures, "black")
        for axes, image in zip(grid[2:], found.best[caption], strict=False):
            is_right = pairs.ids[image] == text_ids[caption]
            show(axes, int(image), pictures, RIGHT if is_right else WRONG)
            axes.set_xlabel("✓" if is_right else "✗", color=RIGHT if is_right else WRONG, labelpad=0, fontsize=8)
        for axes in grid[2 + found.best.shape[1] :]:
            axes.axis("off")


def show(axes: Any, image: int, pictures: np.ndarray | None, frame: str = "") -> None:
    if pictures is None:
        axes.text(0.5, 0.5, f"image\n{image}", ha="center", va="center", fontsize=8, transform=axes.transAxes)
    else:
        axes.imshow(pictures[image])
    for side in axes.spines.values():
        side.set(color=frame or "none", linewidth=2)
