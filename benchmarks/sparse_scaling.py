"""HREMLoss on neighbour lists, forward and backward, from N = 1,024 to 16,384: time, peak memory, exponents.

    python benchmarks/sparse_scaling.py                      # the table of docs/scaling.md and its picture
    python benchmarks/sparse_scaling.py --sizes 1024 2048    # small, without the picture

Each size runs in a process of its own. Three costs are told apart: finding the neighbours and the pair losses, which
look at all N² pairs (a chunk at a time), and all else (alignment of the candidates, relevance, attention, regulariser,
and the backward pass of these). A streamed pair loss finds its gradient in its forward pass, so that its time there is
nearly all of it.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from pathlib import Path

import torch
from _common import extra_peak_mb, in_own_process, make_batch, section, status_kib, table

import hrem_layers.relations.lists
from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction, SigmoidLoss, TripletLoss
from hrem_layers.losses.terms import Pairs

SIZES = (1024, 2048, 4096, 8192, 16384)
PARTS = ("search", "pair losses", "all else")
PAIR_LOSSES = {
    "distance_weighted": TripletLoss,
    "hardest": lambda: TripletLoss(negative_sampling="hardest"),
    "infonce": InfoNCELoss,
    "sigmoid": SigmoidLoss,
}
PICTURE = Path(__file__).parent.parent / "docs" / "sparse_scaling.svg"


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(owner: object, name: str, part: str, seconds: Counter, clock: str) -> None:
    """From now on the seconds in ``owner.name`` are added up."""
    original, now = getattr(owner, name), CLOCKS[clock]

    def call(*args: object, **options: object) -> object:
        start = now()
        result = original(*args, **options)
        seconds[part] += now() - start
        return result

    setattr(owner, name, call)


def measure(n: int, options: argparse.Namespace) -> dict[str, float]:
    torch.set_num_threads(options.threads)
    seconds: Counter = Counter()
    timed(hrem_layers.relations.lists, "nearest_rows", "search", seconds, options.clock)
    timed(Pairs, "loss", "pair losses", seconds, options.clock)
    torch.manual_seed(0)
    loss = HREMLoss(
        options.dim,
        graph=AssociationGraph(candidates=options.candidates, detach_fragments=not options.through),
        interaction=RelationInteraction(options.dim, mechanism=options.mechanism),
        pair_loss=PAIR_LOSSES[options.pair_loss](),
    )

    def work(n: int):
        batch = make_batch(n, options.regions, options.words, options.words, options.dim)
        inputs = [x.requires_grad_(options.through or x.dim() == 2) for x in batch[:4]]
        return lambda: loss(*inputs).backward()

    work(4 * options.candidates)()
    run = work(n)
    seconds.clear()
    now = CLOCKS[options.clock]
    start = now()
    peak = extra_peak_mb(run)
    total = now() - start
    return {
        **{part: seconds[part] for part in PARTS[:2]},
        "all else": total - sum(seconds.values()),
        "total": total,
        "peak": peak,
        "process": status_kib("VmHWM") * 1024 / 1e6,
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of log(value) in log(N), by least squares."""
    x, y = [math.log(n) for n in sizes], [math.log(v) for v in values]
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum((a - mx) ** 2 for a in x)


def draw(found: dict[int, dict[str, float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "sparse scaling"  # the same file from the same numbers
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    sizes = list(found)
    for part in (*PARTS, "total"):
        left.plot(sizes, [found[n][part] for n in sizes], marker="o", label=part)
    right.plot(sizes, [found[n]["peak"] for n in sizes], marker="o", label="beyond the batch")
    right.plot(sizes, [found[n]["process"] for n in sizes], marker="o", label="whole process")
    for axes, name in ((left, "seconds"), (right, "MB at the peak")):
        axes.set(xscale="log", yscale="log", xlabel="N", ylabel=name, xticks=sizes, xticklabels=sizes)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=24)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: less disturbed by others")
    parser.add_argument("--mechanism", choices=("fusion", "standalone"), default="fusion")
    parser.add_argument("--pair-loss", choices=sorted(PAIR_LOSSES), default="distance_weighted")
    parser.add_argument("--through", action="store_true", help="gradients to the fragments (detach_fragments=False)")
    parser.add_argument("--one", action="store_true", help="measure the first size in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.sizes[0], options)))
        return
    torch.set_num_threads(options.threads)
    same = [
        x for name in ("candidates", "regions", "words", "dim", "threads", "clock", "mechanism", "pair_loss")
        for x in (f"--{name.replace('_', '-')}", str(getattr(options, name)))
    ] + ["--through"] * options.through  # fmt: skip
    found = {
        n: json.loads(in_own_process(__file__, "--one", *same, "--sizes", str(n), timeout=3600)) for n in options.sizes
    }
    columns = (*PARTS, "total", "peak", "process")
    rows = [
        [f"{n:,}", *(f"{found[n][x]:.2f}" for x in columns[:4]), *(f"{found[n][x]:.0f}" for x in columns[4:])]
        for n in found
    ]
    if len(found) > 1:
        slopes = [f"{exponent(list(found), [found[n][x] for n in found]):.2f}" for x in columns]
        rows.append(["exponent of N", *slopes])
    if tuple(found) == SIZES:
        draw(found)
    section(
        "HREMLoss on neighbour lists",
        f"Forward and backward, {options.mechanism}, 16 heads, {options.pair_loss}, candidates={options.candidates}, "
        f"R = {options.regions}, W = {options.words}, D = {options.dim}, float32, gradients to the "
        f"{'fragments and ' if options.through else ''}embeddings; one step in a process of its own for each N, "
        f"{options.clock} time. Memory: beyond the batch itself, and of the whole process with batch and PyTorch.",
        table(
            ["N", "search, s", "pair losses, s", "all else, s", "total, s", "beyond the batch, MB", "process, MB"], rows
        ),
        *([f"![Time and memory against N]({PICTURE.name})"] if tuple(found) == SIZES else []),
    )


if __name__ == "__main__":
    main()
