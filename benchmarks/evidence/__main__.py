"""Search, then train afresh: python -m benchmarks.evidence --data icons --rows base recipe --seeds 8 --budget 4

Every row gets the same random settings (``--budget`` of them, each trained ``--search-seeds`` times), the best mean on
dev is then trained with ``--seeds`` fresh seeds. One line per training goes to results.csv; what is there is not
trained again. The weights of the fresh ones wait in the cache folder until ``python -m benchmarks.evidence.read_test``
reads the test split, once per row.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch

from benchmarks.evidence import folders, store
from benchmarks.evidence.encoders import KINDS
from benchmarks.evidence.loaded import Loaded, load
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.training import Trained, evaluate, train

CACHE = Path("~/.cache/hrem-layers/evidence")
SEARCH_SEED = 1000  # the search's seeds count from here, fresh ones from 1
EPOCHS = 8
DEFAULT_ROWS = ("base", "recipe", "relations", "both")


def draw_settings(number: int) -> dict[str, Any]:
    """Setting ``number`` of the search, the same for every row; a row uses what concerns it."""
    r = random.Random(number)
    return {
        "lr": float(f"{10 ** r.uniform(-3.3, -2):.2g}"),
        "batch": r.choice([64, 128]),
        "dropout": r.choice([0.0, 0.1, 0.3]),
        "clip": r.choice([0, 2]),
        "margin": r.choice([0.1, 0.2, 0.3]),
        "temperature": r.choice([0.05, 0.1, 0.2]),
        "relation_weight": r.choice([0.3, 1.0]),
        "images_per_cluster": r.choice([4, 8, 16]),
    }


def label(data: str, *, noise: float, share: float, encoders: str = "heads", epochs: int = EPOCHS) -> str:
    """What column "data" says: ``icons``, ``icons+trainable+noise40+share25+epochs16``; a folder by its name."""
    name = data if data in folders.DATA else Path(data).resolve().name
    parts = [name, *([encoders] if encoders != "heads" else [])]
    parts += [f"noise{100 * noise:.0f}"] if noise else []
    parts += [f"share{100 * share:.0f}"] if share < 1 else []
    parts += [f"epochs{epochs}"] if epochs != EPOCHS else []
    return "+".join(parts)


def weights_path(cache: Path, data: str, row: str, seed: int) -> Path:
    return cache / "weights" / f"{data.replace('/', '_')}-{row}-{seed}.pt"


def best_settings(lines: list[store.Line], data: str, row: str, epochs: int) -> dict[str, Any]:
    """Of the search's settings of this row those with the highest mean rSum on dev, among those with the most seeds."""
    found: dict[str, dict[int, store.Line]] = {}
    for x in lines:
        if (x.data, x.row, x.split, x.settings["epochs"]) == (data, row, "search", epochs):
            found.setdefault(store.as_json(x.settings), {})[x.seed] = x
    most = max(map(len, found.values()))
    totals = {key: sum(x.metrics["rsum"] for x in f.values()) for key, f in found.items() if len(f) == most}
    settings = dict(next(iter(found[max(totals, key=totals.__getitem__)].values())).settings)
    del settings["epochs"]
    return settings


def run(
    data: Loaded, name: str, rows: list[str], *, seeds: int, budget: int, epochs: int, results: Path, cache: Path,
    encoders: str = "heads", search_seeds: int = 1,
) -> None:  # fmt: skip
    """All trainings that ``results`` does not hold yet: first the search of every row, then seed by seed."""
    done = {x.key for x in store.read(results)}
    commit = store.commit()

    def once(row: str, seed: int, split: str, settings: dict[str, Any]) -> None:
        settings = {**settings, "epochs": epochs}
        if (name, row, seed, split, store.as_json(settings)) in done:
            return
        trained: Trained = train(data, ROWS[row], settings, seed=seed, epochs=epochs, encoders=encoders)
        if split == "dev":
            path = weights_path(cache, name, row, seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state": trained.model.state_dict(), "settings": settings}, path)
        metrics = evaluate(*trained.model.embed(data.dev), data.dev.owner)
        line = store.Line(name, row, seed, split, metrics, settings, trained.seconds, commit)
        store.append(results, [line])
        print(f"{name} {row} seed {seed} {split}: rSum {metrics['rsum']:.1f}, {trained.seconds:.0f} s", flush=True)

    for seed in range(SEARCH_SEED, SEARCH_SEED + search_seeds):
        for number in range(budget):
            for row in rows:
                once(row, seed, "search", draw_settings(number))
    lines = store.read(results)
    for seed in range(1, seeds + 1):
        for row in rows:
            once(row, seed, "dev", best_settings(lines, name, row, epochs))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m benchmarks.evidence", description=__doc__.splitlines()[0])
    p.add_argument("--data", required=True, help=f"{', '.join(folders.DATA)}, or a folder in the precomputed form")
    p.add_argument("--captions-per-image", type=int, help="of a folder [5]")
    p.add_argument("--noise", type=float, default=0.0, help="share of the training captions shuffled among images")
    p.add_argument("--share", type=float, default=1.0, help="share of the training images that are used")
    p.add_argument("--encoders", choices=KINDS, default="heads",
                   help="heads on frozen features, or a CNN and a GRU that train as well [%(default)s]")  # fmt: skip
    p.add_argument("--epochs", type=int, default=EPOCHS, help="passes over the images, a caption each [%(default)s]")
    p.add_argument("--cache-dir", type=Path, default=CACHE, help="packages, features, weights [%(default)s]")
    return p


def load_named(arguments: argparse.Namespace) -> tuple[Loaded, str]:
    for name, low in (("noise", 0.0), ("share", 0.001)):
        value = getattr(arguments, name)
        if not low <= value <= 1:
            raise ValueError(f"--{name}: expected a share from {low:g} to 1, got {value}")
    pixels = arguments.encoders == "trainable"
    folder = (folders.prepare_pixels if pixels else folders.prepare)(arguments.data, arguments.cache_dir.expanduser())
    captions = arguments.captions_per_image or folders.CAPTIONS.get(arguments.data, 5)
    data = load(folder, captions, noise=arguments.noise, share=arguments.share, pixels=pixels)
    a = arguments
    return data, label(a.data, noise=a.noise, share=a.share, encoders=a.encoders, epochs=a.epochs)


def main(argv: list[str] | None = None) -> None:
    p = parser()
    p.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(DEFAULT_ROWS), metavar="ROW",
                   help=f"of {', '.join(ROWS)} [%(default)s]")  # fmt: skip
    p.add_argument("--seeds", type=int, default=8, help="fresh seeds per row [%(default)s]")
    p.add_argument("--budget", type=int, default=8, help="settings tried per row [%(default)s]")
    p.add_argument("--search-seeds", type=int, default=3, help="trainings per setting of the search [%(default)s]")
    p.add_argument("--results", type=Path, default=store.RESULTS)
    arguments = p.parse_args(argv)
    if arguments.seeds < 0 or min(arguments.budget, arguments.epochs, arguments.search_seeds) < 1:
        p.error("--seeds must be at least 0, --budget, --epochs and --search-seeds at least 1")
    data, name = load_named(arguments)
    run(
        data, name, arguments.rows, seeds=arguments.seeds, budget=arguments.budget, epochs=arguments.epochs,
        results=arguments.results, cache=arguments.cache_dir.expanduser(), encoders=arguments.encoders,
        search_seeds=arguments.search_seeds,
    )  # fmt: skip


if __name__ == "__main__":
    main()
