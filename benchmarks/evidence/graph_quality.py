"""Whether the mean alignment p knows which text is an image's own: python -m benchmarks.evidence.graph_quality

Percentiles of the own text under p and the correlation of p with the caption's length, for "scan" and "cosine".
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evidence import folders, store
from benchmarks.evidence.__main__ import CACHE, draw_settings
from benchmarks.evidence.encoders import Pair
from benchmarks.evidence.loaded import Loaded, Split, load
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.training import train
from hrem_layers.alignment import align_fragments

BATCH = 128
COLUMNS = ("data", "encoders", "alignment", "percentile_i2t", "percentile_t2i", "length_i2t", "length_t2i")


def percentile_of_own(p: Tensor) -> float:
    """Mean over the rows of p (N, N) of the share of the others that are below the diagonal; ties count half."""
    own = p.diagonal().unsqueeze(1)
    others = ~torch.eye(len(p), dtype=torch.bool)
    below = (p < own).double() + (p == own).double() / 2
    return below[others].mean().item()


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x.double().flatten(), y.double().flatten()]))[0, 1].item()


@torch.no_grad()
def measure(model: Pair, split: Split, alignment: str) -> dict[str, float]:
    """Means over the batches of the split, the first caption of each image. Keys are the numeric columns."""
    model.eval()
    found = []
    size = min(BATCH, len(split.images))
    for start in range(0, len(split.images) - size + 1, size):
        images = torch.arange(start, start + size)
        tokens = split.tokens[torch.searchsorted(split.owner, images)]
        real, mask = split.masked(images), tokens > 0
        _, _, regions, words = model(split.images[images], tokens, real)
        p = align_fragments(regions, words, real, mask, topk=1, mode=alignment)
        length = mask.sum(dim=1).double()
        i2t, t2i = p.mean_i2t, p.mean_t2i  # [image, text], [text, image]
        found.append([
            percentile_of_own(i2t), percentile_of_own(t2i),
            correlation(i2t, length.expand_as(i2t)), correlation(t2i, length.unsqueeze(1).expand_as(t2i)),
        ])  # fmt: skip
    return dict(zip(COLUMNS[3:], torch.tensor(found).mean(dim=0).tolist(), strict=True))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.graph_quality", description=__doc__)
    parser.add_argument("--data", nargs="+", default=["icons", "openclipart", "stamps", "synthetic"])
    parser.add_argument("--captions-per-image", type=int)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--cache-dir", type=Path, default=CACHE)
    parser.add_argument("--out", type=Path, default=store.HERE / "graph_quality.csv")
    arguments = parser.parse_args(argv)
    rows = []
    for name in arguments.data:
        folder = folders.prepare(name, arguments.cache_dir.expanduser())
        data: Loaded = load(folder, arguments.captions_per_image or folders.CAPTIONS.get(name, 5))
        torch.manual_seed(0)
        start = Pair(data, 0.0)
        settings = {**draw_settings(0), "lr": 3e-3, "batch": 64, "dropout": 0.1, "clip": 2, "margin": 0.2}
        trained = train(data, ROWS["base"], settings, seed=0, epochs=arguments.epochs).model
        for encoders, model in (("initial", start), ("trained base", trained)):
            for alignment in ("scan", "cosine"):
                found = measure(model, data.dev, alignment)
                rows.append([Path(name).name, encoders, alignment, *(f"{x:.2f}" for x in found.values())])
                print(" ".join(rows[-1]), flush=True)
    with arguments.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
