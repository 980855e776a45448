"""How the cost grows with the batch, dense and with candidates; and arithmetic for a batch no machine here holds.

    python benchmarks/scaling_counts.py                     # prints the tables of docs/scaling.md

The first two tables are measured: FLOP of matrix products as counted by torch.profiler (see
distributed_counts.py), CPU seconds of one call on one thread, and how far the resident memory of a fresh process
rose above what it held before the call. The last table is arithmetic with the formulas in :func:`step_costs`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from pathlib import Path

import torch
from _common import where
from distributed_counts import counted

from hrem_layers import AssociationGraph, HREMLoss, RelationInteraction, TripletLoss


def inputs(options: argparse.Namespace, n: int, grad: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    d = options.dim
    shapes = (n, d), (n, d), (n, options.regions, d), (n, options.words, d)
    return [torch.randn(*shape, requires_grad=grad) for shape in shapes]


def graph_work(options: argparse.Namespace, n: int, candidates: int | None):
    module, given = AssociationGraph(candidates=candidates), inputs(options, n, grad=False)

    def work() -> None:
        with torch.no_grad():
            module(*given)

    return work


def graph_training_work(options: argparse.Namespace, n: int, candidates: int | None):
    module, given = AssociationGraph(candidates=candidates, detach_fragments=False), inputs(options, n, grad=True)

    def work() -> None:
        module(*given).relevance.sum().backward()

    return work


def loss_work(options: argparse.Namespace, n: int, candidates: int | None):
    loss = HREMLoss(
        options.dim,
        graph=AssociationGraph(candidates=candidates),
        interaction=RelationInteraction(options.dim),
        pair_loss=TripletLoss(negative_sampling="hardest"),
    )
    given = inputs(options, n, grad=True)
    return lambda: loss(*given).backward()


def measure(make, options: argparse.Namespace, n: int, candidates: int | None) -> tuple[dict, float, int]:
    """FLOP, seconds and bytes of one call of the work that ``make`` prepares, in a process of its own."""

    def child(pipe) -> None:
        torch.set_num_threads(1)
        make(options, 4, None if candidates is None else 2)()  # loads what is loaded at the first call
        work = make(options, n, candidates)
        page = resource.getpagesize()
        before = int(Path("/proc/self/statm").read_text().split()[1]) * page
        start = time.process_time()
        work()
        seconds = time.process_time() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        pipe.send((dict(counted(work)), seconds, peak))

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(there,))
    process.start()
    there.close()
    try:
        return here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"the process for N = {n}, candidates = {candidates} ended with {process.exitcode}"
        ) from None


def without_alignment(flops: dict[str, int]) -> float:
    """In GFLOP."""
    return sum(x for kind, x in flops.items() if kind != "alignment") / 1e9


def graph_table(options: argparse.Namespace) -> None:
    r, w, d = options.regions, options.words, options.dim
    print(f"\n### AssociationGraph (measured; R = {r}, W = {w}, D = {d}, one thread)\n")
    print("| N | candidates | alignment, GFLOP | other products, GFLOP | forward, CPU s | memory, MB | "
          "forward and backward to the fragments, CPU s |")  # fmt: skip
    print("|---|---|---|---|---|---|---|")
    for n in options.sizes:
        for k in (None, *(k for k in options.candidates if k < n)):
            flops, seconds, memory = measure(graph_work, options, n, k)
            training = "not run"
            if k is not None or n <= options.largest_dense_backward:
                training = f"{measure(graph_training_work, options, n, k)[1]:.2f}"
            print(
                f"| {n} | {k or 'none (dense)'} | {flops.get('alignment', 0) / 1e9:.2f} | "
                f"{without_alignment(flops):.3f} | {seconds:.2f} | {memory / 1e6:.0f} | {training} |",
                flush=True,
            )


def loss_table(options: argparse.Namespace) -> float:
    """Returns the bytes per N² of the dense loss at the largest N."""
    print(f"\n### HREMLoss, fusion, 16 heads, forward and backward (measured; D = {options.dim})\n")
    print("| N | candidates | alignment, GFLOP | the rest, GFLOP | CPU s | memory, MB | memory / N², bytes |")
    print("|---|---|---|---|---|---|---|")
    per_square = 0.0
    for n in options.loss_sizes:
        for k in (None, options.candidates[0]):
            flops, seconds, memory = measure(loss_work, options, n, k)
            if k is None:
                per_square = memory / n**2
            print(
                f"| {n} | {k or 'none (dense)'} | {flops['alignment'] / 1e9:.2f} | {without_alignment(flops):.2f} | "
                f"{seconds:.2f} | {memory / 1e6:.0f} | {memory / n**2:.0f} |",
                flush=True,
            )
    return per_square


def step_costs(
    n: int, processes: int, r: int, w: int, d: int, *, heads: int, candidates: int | None, through: bool, size: int
) -> dict[str, float]:
    """One step of the gathered loss on one of ``processes``: FLOP, bytes received, bytes held.

    Fusion with one layer and ffn_dim = D, a pair loss that streams, at least ``candidates`` neighbours within a
    modality; fragments in numbers of ``size`` bytes, all else float32; ``through``: gradients to the fragments
    (detach_fragments=False). ``python benchmarks/scaling_counts.py --check`` compares with what is counted.
    """
    sparse, nodes, elsewhere = candidates is not None, 2 * n, (processes - 1) / processes
    shared = processes if sparse else 1  # over how many the work after the alignment is shared
    k = candidates if sparse else n
    pairs = (2 * n * k if sparse else n * n) / processes  # each direction aligns its own candidates
    embeddings = nodes * d * 4
    fetched = min(1, k / processes) if sparse else 1  # at most: two rows may have one candidate
    received = {
        "fragments received": fetched * n * d * size * (r + w if sparse else min(r, w)) * (2 if through else 1),
        "p and S received": 0 if sparse else 4 * 4 * n * n,
        # the embeddings; keys and values, enhanced
        "embeddings and their like received": embeddings * (1 + (2 + 1 if sparse else 0)),
        # keys and values, distances (float64), four pair losses
        "their gradients received": embeddings * (2 + 2 + 4) if sparse else 0,
    }
    return {
        "alignment, FLOP": pairs * 2 * r * w * d * (4 if through else 1),
        "cosines to find neighbours, FLOP (float64)": 2 * d * (4 * n * n if sparse else 3 * n * n) / shared,
        # attention: 2 and 4 more in backward, over both blocks; distances 3 within; the guide across
        "attention, distances, guide, FLOP": 2
        * nodes
        * d
        * ((6 * 2 + 3 + 1) * k if sparse else 6 * nodes + 3 * n)
        / shared,
        # four losses; streamed, images and texts each compute their own similarities
        "pair losses, FLOP": 4 * 3 * (2 if sparse else 1) * 2 * n * n * d / shared,
        "projections and feed-forward, FLOP": 3 * 6 * 2 * nodes * d * d / shared,
        **{f"{name}, bytes": volume * elsewhere for name, volume in received.items()},
        "fragments of one modality, received and normalised, bytes": fetched * n * max(r, w) * d * (size + 4),
        "A and S held, bytes": nodes * (2 * k * (8 + 4 + 1) / processes if sparse else nodes * (4 + 1)),
        "attention weights of all heads, bytes": heads * nodes * (2 * k / processes if sparse else nodes) * 4,
    }


def arithmetic_table(per_square: float) -> None:
    n, processes, r, w, d, heads, k = 32768, 256, 36, 32, 1024, 16, 64
    print(f"\n### Arithmetic, nothing measured: N = {n}, {processes} processes, R = {r}, W = {w}, D = {d}, "
          f"{heads} heads, fragments in 2 bytes, fragments detached\n")  # fmt: skip
    sizes = {
        "one process, N = 128": (128, 1, None), "dense": (n, processes, None), f"candidates={k}": (n, processes, k),
    }  # fmt: skip
    columns = {
        name: step_costs(n, p, r, w, d, heads=heads, candidates=k, through=False, size=2)
        for name, (n, p, k) in sizes.items()
    }
    print("| of one process in one step | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns["dense"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2g}" for column in columns.values()) + " |")
    flop = [sum(x for name, x in column.items() if "FLOP" in name) for column in columns.values()]
    volume = [sum(x for name, x in column.items() if name.endswith("received, bytes")) for column in columns.values()]
    print("| **all FLOP** | " + " | ".join(f"{x:.2g}" for x in flop) + " |")
    print("| **all bytes received** | " + " | ".join(f"{x:.2g}" for x in volume) + " |")
    seconds = [f / 1e14 + b / 25e9 for f, b in zip(flop, volume, strict=True)]
    print("| **s at 10¹⁴ FLOP and 25·10⁹ bytes per second, one after the other** | "
          + " | ".join(f"{x:.2g}" for x in seconds) + " |")  # fmt: skip
    if per_square:
        print(f"| the whole dense loss at the {per_square:.0f} bytes · N² measured above, bytes | "
              f"{per_square * 128**2:.2g} | {per_square * n**2:.2g} | none of it |")  # fmt: skip


def check_table(counts: Path) -> None:
    """What distributed_counts.py counted (``--json``), beside the formulas."""
    found = json.loads(counts.read_text())
    given, rows = found["options"], found["rows"]
    print("\n### Counted / formula\n\n| processes | work | counted | formula | ratio |\n|---|---|---|---|---|")
    name = next(name for name in rows if "candidates" in name)
    for world, (flops, volume) in rows[name].items():
        costs = step_costs(
            given["items"], int(world), given["regions"], given["words"], given["dim"], heads=16,
            candidates=given["candidates"], through=False, size=4,
        )  # fmt: skip
        align, search, near, pairs, rest = (x for name, x in costs.items() if "FLOP" in name)
        received = [x for name, x in costs.items() if "received, bytes" in name]
        for kind, counted_, formula in (
            ("alignment", flops["alignment"], align), ("search", flops["search"], search),
            ("neighbours", flops["neighbours"], near), ("pair losses", flops["pair losses"], pairs),
            ("projections", flops["rest"], rest), ("all-gathers", volume["all-gather"], received[2]),
            ("all-to-alls (formula: at most)", volume["all-to-all"], received[0]),
            ("reduce-scatters", volume["reduce-scatter"], received[3]),
        ):  # fmt: skip
            ratio = f"{counted_ / formula:.3f}" if formula else "-"
            print(f"| {world} | {kind} | {counted_:.4g} | {formula:.4g} | {ratio} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--loss-sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--largest-dense-backward", type=int, default=512)
    parser.add_argument("--check", type=Path, help="what distributed_counts.py --json wrote: compare, and nothing else")
    options = parser.parse_args()
    if options.check:
        check_table(options.check)
        return
    if options.sizes:
        graph_table(options)
    per_square = loss_table(options) if options.loss_sizes else 0
    arithmetic_table(per_square)
    torch.set_num_threads(1)  # as every process here had
    print(f"\n{where()}")


if __name__ == "__main__":
    main()
