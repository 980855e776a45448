"""How do time and memory grow with the batch, beside a dense form and a loop over captions?"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _baselines import dense, per_caption
from _common import extra_peak_mb, in_own_process, make_batch, section, table

from hrem_layers import align_fragments

FORMS = ("align_fragments", "dense PyTorch", "loop over captions")
SIZES = (32, 64, 128, 256, 512, 1024, 2048)
REGIONS, SHORTEST, LONGEST, DIM = 36, 8, 24, 256
# autograd keeps about this many numbers a similarity in the two plain forms: see the peaks at N = 128 and 256
KEPT_BY_AUTOGRAD = 8
MOST_BYTES = 6e9
PICTURE = Path(__file__).parent.parent / "docs" / "cost_curves.svg"


def measure(form: str, n: int) -> tuple[float, float]:
    """Median seconds and extra peak MB of a forward and backward pass."""
    torch.set_num_threads(2)

    def work(n: int):
        batch = make_batch(n, REGIONS, SHORTEST, LONGEST, DIM)
        r, c, mask = batch.image_fragments.requires_grad_(), batch.text_fragments.requires_grad_(), batch.text_mask
        lengths = mask.sum(dim=1).tolist()
        align = {
            "align_fragments": lambda: align_fragments(r, c, None, mask),
            "dense PyTorch": lambda: dense(r, c, mask),
            "loop over captions": lambda: per_caption(r, c, lengths),
        }[form]
        return lambda: sum(x.square().sum() for x in align()).backward()

    work(8)()
    run = work(n)
    peak = extra_peak_mb(run)
    seconds = []
    while len(seconds) < (1 if n > 512 else 5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), peak


def too_large(form: str, n: int) -> bool:
    width = LONGEST if form == "dense PyTorch" else (SHORTEST + LONGEST) / 2
    return form != "align_fragments" and n * n * REGIONS * width * 4 * KEPT_BY_AUTOGRAD > MOST_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=2, metavar=("FORM", "N"), help="measure one point in this process")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out larger batches")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one[0], int(arguments.one[1]))))
        return
    sizes = [n for n in SIZES if n <= arguments.largest]
    found: dict[str, dict[int, tuple[float, float]]] = {form: {} for form in FORMS}
    for n in sizes:
        for form in FORMS:
            if not too_large(form, n):
                found[form][n] = json.loads(in_own_process(__file__, "--one", form, str(n)))
    whole = tuple(sizes) == SIZES
    if whole:
        draw(found)

    def cell(form: str, n: int) -> str:
        if n not in found[form]:
            return "over 6 GB, left out"
        seconds, peak = found[form][n]
        return f"{seconds:.3f} s, {peak:.0f} MB"

    torch.set_num_threads(2)
    section(
        "Cost curves",
        f"Forward and backward of the alignment, {REGIONS} regions, {SHORTEST} to {LONGEST} words, D = {DIM}, float32: "
        "median time and extra peak memory, each point in a process of its own.",
        table(["N", *FORMS], [[str(n), *(cell(form, n) for form in FORMS)] for n in sizes]),
        *([f"![Time and peak memory against the batch size]({PICTURE.name})"] if whole else []),
    )


def draw(found: dict[str, dict[int, tuple[float, float]]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "cost curves"  # the same file from the same numbers
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for axis, place, label in zip(axes, (0, 1), ("seconds", "extra peak memory, MB"), strict=True):
        for form, points in found.items():
            axis.plot(list(points), [value[place] for value in points.values()], marker="o", label=form)
        axis.set(xscale="log", yscale="log", xlabel="batch size N", ylabel=label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(SIZES, [str(n) for n in SIZES])
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
