"""Writes docs/results.md and its plot from the CSV of trainings: python -m benchmarks.evidence.tables"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import collapse, store
from benchmarks.evidence.effects import difference_of, effects_section, equal_settings_section
from benchmarks.evidence.statistics import Difference, number, summarize

DOCS = Path(__file__).parents[2] / "docs"
INTRODUCTION = """# Results

What relations and neighbour batches bring over an equally tuned base, measured by `python -m benchmarks.evidence` and
written by `python -m benchmarks.evidence.tables` from `benchmarks/evidence/results.csv`, a line per training.

Every row gets the same number of the same random settings (learning rate, batch, dropout, clipping, margin,
temperature, weight of the relational terms, images per cluster), the best on dev is trained afresh with new seeds, and
the test split is read once per row (`benchmarks/evidence/readings.csv` logs when). Difference: to `base` (or to
`base_infonce` for rows on InfoNCE), paired by seed, with its 95% t interval; "could see" is the smallest true
difference that the experiment would have found with probability 0.8. The intervals cover the scatter of training
seeds, for one choice of settings and one split; with many rows, one in twenty is off by chance. In the first regimes a
setting was judged by one training, later by the mean of three (`--search-seeds`); the tables say how many trainings
the search had.

The form of the interaction (the residual) and the recipe were chosen on icons, on pictures that overlap the first test
split of that source. So its test split was drawn anew, from families of which no picture had been in an earlier test or
dev split or in the held-out part of that study (`splits/read/icons.txt` lists those); "first split" marks the tables
from before. Test splits of openclipart and stamps were read after the choice, once per row.

Rows named `relations...` had the residual without a gate (`gate=None`), which was the default when they were run;
`relations_gated` and what begins with `gated` have the library's default, a gate learned from 0.

The data are drawings with names and keywords (icons, openclipart, stamps), scenes of two to four emoji with five
captions each (other ones than the script's default data) and topics made in code (synthetic). Encoders are small: heads
on frozen features of an ImageNet network and on frozen word vectors, or a CNN and a GRU from scratch
(`--encoders trainable`). They say nothing about the figures on Flickr30K or COCO.
`python -m benchmarks.evidence --data FOLDER` makes the same table of any data in the field's precomputed form.
"""
NAMES = {"icons_split1": "icons, first split (read before the form of the interaction was chosen)"}
DATA_NOTES = {
    "trainable": "CNN and GRU trained from scratch",
    "noise": "{}% of the training captions shuffled among the images",
    "share": "{}% of the training images",
    "epochs": "{} epochs",
}


def base_of(row: str) -> str:
    return "base_infonce" if row.endswith("_infonce") else "base"


def difference(lines: Sequence[store.Line], data: str, row: str, split: str) -> Difference | None:
    """To the base, over the seeds that both have; None if there are none."""
    return difference_of(lines, data, row, base_of(row), split)


def main_table(lines: Sequence[store.Line], data: str, split: str) -> list[str]:
    rows = list(dict.fromkeys(x.row for x in lines if x.data == data and x.split == split))
    out = [
        "| row | seeds | rSum | i2t R@1 | t2i R@1 | difference | could see |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        means = [
            summarize(list(store.by_seed(lines, data, row, split, m).values())) for m in ("rsum", "i2t_r1", "t2i_r1")
        ]
        total = number(means[0].mean) + (f" ± {number(means[0].error)}" if means[0].n > 1 else "")
        d = None if row == base_of(row) else difference(lines, data, row, split)
        ends = ["", ""] if d is None else [f"{number(d.mean, True)} ± {number(d.half)}", number(d.detectable)]
        cells = [f"`{row}`", str(means[0].n), total, number(means[1].mean), number(means[2].mean), *ends]
        out.append(f"| {' | '.join(cells)} |")
    return out


def subset_table(lines: Sequence[store.Line], data: str) -> list[str]:
    """Differences on the subsets of the test split; empty where none were read."""
    rows = [r for r in dict.fromkeys(x.row for x in lines if x.data == data and x.split == "test") if r != base_of(r)]
    parts = list(dict.fromkeys(x.split for x in lines if x.data == data and x.split.startswith("test:")))
    if not rows or not parts:
        return []
    head = [p.removeprefix("test:") for p in parts]
    out = [f"| row | {' | '.join(head)} |", f"|---|{'---|' * len(parts)}"]
    for row in rows:
        cells = []
        for part in parts:
            d = difference(lines, data, row, part)
            cells.append("" if d is None else f"{number(d.mean, True)} ± {number(d.half)}")
        out.append(f"| `{row}` | {' | '.join(cells)} |")
    return out


def describe(data: str) -> str:
    name, *rest = data.split("+")
    name = NAMES.get(name, name)
    for part in rest:
        for key, text in DATA_NOTES.items():
            if part.startswith(key):
                name += ", " + text.format(part.removeprefix(key))
    return name


def tables(lines: Sequence[store.Line]) -> str:
    """Of every data set what its rows reached on test and dev, and on parts of test."""
    out = ["## All tables\n"]
    for data in dict.fromkeys(x.data for x in lines):
        searched = [x.row for x in lines if (x.data, x.split) == (data, "search")]
        budget = ", ".join(map(str, sorted({searched.count(row) for row in searched})))
        out.append(f"### {describe(data)[0].upper()}{describe(data)[1:]}\n")
        out.append(f"Trainings of the search per row: {budget}. rSum: mean ± standard error over the fresh seeds.\n")
        for split, title in (("test", "Test"), ("dev", "Dev, on which the settings were chosen")):
            if any(x.data == data and x.split == split for x in lines):
                out += [f"{title}:\n", *main_table(lines, data, split), ""]
        parts = subset_table(lines, data)
        if parts:
            out += [
                "Difference to the base of rSum on parts of the test split (whole galleries): `rare2` captions whose "
                "rarest word has at most 2 training occurrences, `near` the quarter of the images whose nearest other "
                "image is closest:\n",
                *parts,
                "",
            ]
    return "\n".join(out)


def draw(lines: Sequence[store.Line], path: Path) -> None:
    """Paired differences with intervals, on test where it was read, else on dev."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "results"
    import matplotlib.pyplot as plt

    found = []
    for data in dict.fromkeys(x.data for x in lines):
        for row in dict.fromkeys(x.row for x in lines if x.data == data):
            d = next((d for s in ("test", "dev") if (d := difference(lines, data, row, s))), None)
            if d is not None and row != base_of(row) and not math.isnan(d.half):
                found.append((f"{data}: {row}", d))
    if not found:
        return
    figure, axes = plt.subplots(figsize=(7, 1 + 0.3 * len(found)), layout="constrained")
    axes.errorbar([d.mean for _, d in found], range(len(found)), xerr=[d.half for _, d in found], fmt="o", capsize=3)
    axes.set_yticks(range(len(found)), [name for name, _ in found])
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_xlabel("difference of rSum to the tuned base, 95% interval")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def quality_section(path: Path) -> str:
    """The table of graph_quality.py, if it was run."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    out = [
        "\n## What the graph knows: `scan` and `cosine`\n",
        "Of p, the mean alignment, in batches of 128 pairs of dev (or all): the percentile of an image's own text "
        "among the texts of the batch (1 = first, 0.5 = chance) and likewise of a text's own image, and the "
        "correlation of p with the caption's length. Encoders as initialised, and as the base trains them "
        "(`python -m benchmarks.evidence.graph_quality`).\n",
        "| data | encoders | alignment | own text, i2t | own image, t2i | length, i2t | length, t2i |",
        "|---|---|---|---|---|---|---|",
    ]
    keys = ("data", "encoders", "alignment", "percentile_i2t", "percentile_t2i", "length_i2t", "length_t2i")
    out += [f"| {' | '.join(r[k] for k in keys)} |" for r in rows]
    return "\n".join(out) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evidence.tables", description=__doc__)
    parser.add_argument("--results", type=Path, default=store.RESULTS)
    parser.add_argument("--docs", type=Path, default=DOCS)
    arguments = parser.parse_args(argv)
    lines = store.read(arguments.results)
    if not lines:
        parser.error(f"{arguments.results} holds no trainings")
    beside = arguments.results.with_name
    plot = arguments.docs / "results.svg"
    draw(lines, plot)
    parts = [
        INTRODUCTION,
        _written(beside("guide.md")),
        effects_section(lines),
        equal_settings_section(lines),
        "![differences to the base](results.svg)\n" if plot.is_file() else "",
        tables(lines),
        quality_section(beside("graph_quality.csv")),
        _written(beside("collapse.md")),
        "\n".join(collapse.summary(trainings)) + "\n" if (trainings := collapse.read(beside("collapse.csv"))) else "",
    ]
    text = "\n".join(part.strip("\n") + "\n" for part in parts if part.strip())
    (arguments.docs / "results.md").write_text(text, encoding="utf-8")


def _written(path: Path) -> str:
    """A part of the page that is written by hand, from the tables."""
    return path.read_text(encoding="utf-8") if path.is_file() else ""


if __name__ == "__main__":
    main()
