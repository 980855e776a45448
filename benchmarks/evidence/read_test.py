"""Reads the test split, once per row: python -m benchmarks.evidence.read_test --data icons --rows base recipe

All fresh seeds of a row are read together, from the weights that the trainings left in the cache folder, on the whole
split and on subsets: captions with rare words, images with near neighbours. Each reading is logged in readings.csv
and refused a second time.
"""

from __future__ import annotations

import csv
import datetime
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.evidence import store
from benchmarks.evidence.__main__ import load_named, parser, weights_path
from benchmarks.evidence.encoders import make_pair
from benchmarks.evidence.loaded import Loaded
from benchmarks.evidence.rows import ROWS
from benchmarks.evidence.training import evaluate
from hrem_layers._core.numerics import l2_normalize
from hrem_layers.retrieval import retrieval_metrics

RARE = (2, 5, 20)
COLUMNS = ("time", "data", "row", "seeds", "commit")


def subsets(data: Loaded) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> which images and which captions of the test split ask, (n,) and (m,) bool; the galleries stay whole.

    ``rare2``: captions whose rarest word occurs in at most 2 training captions, and their images; ``near``: the
    quarter of the images whose nearest other image, by mean features, is closest, and their captions.
    """
    train, test = data.train, data.test
    flat = train.tokens[train.tokens > 0]
    counts = torch.zeros(len(data.vectors), dtype=torch.long).index_add_(0, flat, torch.ones_like(flat))
    rarest = torch.where(test.mask, counts[test.tokens], counts.max() + 1).amin(dim=1)  # [m]
    out = {}
    for limit in RARE:
        texts = rarest <= limit
        images = torch.zeros(len(test.images), dtype=torch.bool)
        images[test.owner[texts]] = True
        out[f"rare{limit}"] = images, texts
    x = l2_normalize(test.means())
    nearest = (x @ x.t()).fill_diagonal_(-1).amax(dim=1)
    near = nearest >= nearest.quantile(0.75)
    out["near"] = near, near[test.owner]
    return {name: masks for name, masks in out.items() if masks[0].any() and masks[1].any()}


def evaluate_subset(v: Tensor, u: Tensor, owner: Tensor, images: Tensor, texts: Tensor) -> dict[str, float]:
    """The columns of a result line where only these images and captions ask, in the whole galleries."""
    n = torch.arange(len(v))
    to_text = _one_way(v[images], u, n[images], owner)
    to_image = _one_way(u[texts], v, owner[texts], n)
    out = {f"{way}_{k}": value for way, m in (("i2t", to_text), ("t2i", to_image)) for k, value in m.items()}
    return {"rsum": sum(out.values()), **out}


def _one_way(queries: Tensor, gallery: Tensor, ids: Tensor, gallery_ids: Tensor) -> dict[str, float]:
    # a query of the first kind asks the gallery; only that direction is read
    m = retrieval_metrics(queries, gallery, image_ids=ids, text_ids=gallery_ids, unmatched="distractor").i2t
    return {"r1": m.r1, "r5": m.r5, "r10": m.r10}


def read_row(
    data: Loaded, name: str, row: str, *, results: Path, readings: Path, cache: Path, encoders: str = "heads"
) -> list[store.Line]:
    """The new lines of one row, which are appended to ``results``.

    Raises:
        RuntimeError: the row was read before, has no trainings, or their weights are gone.
    """
    if readings.is_file():
        with readings.open(encoding="utf-8", newline="") as file:
            for old in csv.DictReader(file):
                if (old["data"], old["row"]) == (name, row):
                    raise RuntimeError(f"{row} on {name}: the test split was read at {old['time']}, and once is all")
    # the last training of each seed, whose weights are there
    trained = list({x.seed: x for x in store.read(results) if (x.data, x.row, x.split) == (name, row, "dev")}.values())
    if not trained:
        raise RuntimeError(f"{row} on {name}: expected trainings in {results}, found none")
    paths = [weights_path(cache, name, row, x.seed) for x in trained]
    for path in paths:
        if not path.is_file():
            raise RuntimeError(f"{row} on {name}: expected the weights {path}, found none")
    asked = subsets(data)
    lines = []
    for line, path in zip(trained, paths, strict=True):
        model = make_pair(encoders, data, 0.0)
        model.load_state_dict(torch.load(path, weights_only=True)["state"])
        v, u = model.embed(data.test)
        owner, end = data.test.owner, line._replace(split="test", commit=store.commit())
        lines.append(end._replace(metrics=evaluate(v, u, owner)))
        for part, masks in asked.items():
            lines.append(end._replace(split=f"test:{part}", metrics=evaluate_subset(v, u, owner, *masks)))
    store.append(results, lines)
    new = not readings.is_file()
    with readings.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow(COLUMNS)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        writer.writerow([now, name, row, " ".join(str(x.seed) for x in trained), store.commit()])
    return lines


def main(argv: list[str] | None = None) -> None:
    p = parser()
    p.prog, p.description = "python -m benchmarks.evidence.read_test", __doc__.splitlines()[0]
    p.add_argument("--rows", nargs="+", choices=list(ROWS), required=True, metavar="ROW")
    p.add_argument("--results", type=Path, default=store.RESULTS)
    p.add_argument("--readings", type=Path, default=store.READINGS)
    arguments = p.parse_args(argv)
    data, name = load_named(arguments)
    for row in arguments.rows:
        lines = read_row(
            data, name, row, results=arguments.results, readings=arguments.readings,
            cache=arguments.cache_dir.expanduser(), encoders=arguments.encoders,
        )  # fmt: skip
        whole = [x.metrics["rsum"] for x in lines if x.split == "test"]
        print(f"{name} {row}: test rSum {sum(whole) / len(whole):.1f}, mean of {len(whole)}")


if __name__ == "__main__":
    main()
