"""How the cost grows with the batch, dense and with candidates; and arithmetic for a batch no machine here holds.

    python benchmarks/scaling_counts.py                     # prints the tables of docs/scaling.md

The first two tables are measured: FLOP of matrix products as counted by torch.profiler (see
distributed_counts.py), CPU seconds of one call on one thread, and how far the resident memory of a fresh process
rose above what it held before the call. The last table is arithmetic with the formulas in :func:`step_costs`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from pathlib import Path

import torch
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
                f"{flops.get('rest', 0) / 1e9:.3f} | {seconds:.2f} | {memory / 1e6:.0f} | {training} |",
                flush=True,
            )


def loss_table(options: argparse.Namespace) -> float:
    """Returns the bytes per N² measured last: at the largest N, with candidates."""
    print(f"\n### HREMLoss, fusion, 16 heads, forward and backward (measured; D = {options.dim})\n")
    print("| N | candidates | alignment, GFLOP | the rest, GFLOP | CPU s | memory, MB | memory / N², bytes |")
    print("|---|---|---|---|---|---|---|")
    per_square = 0.0
    for n in options.loss_sizes:
        for k in (None, options.candidates[0]):
            flops, seconds, memory = measure(loss_work, options, n, k)
            per_square = memory / n**2
            print(
                f"| {n} | {k or 'none (dense)'} | {flops['alignment'] / 1e9:.2f} | {flops['rest'] / 1e9:.2f} | "
                f"{seconds:.2f} | {memory / 1e6:.0f} | {per_square:.0f} |",
                flush=True,
            )
    return per_square


def step_costs(
    n: int, processes: int, r: int, w: int, d: int, *, heads: int, candidates: int | None, through: bool, size: int
) -> dict[str, float]:
    """One step of the gathered loss on one of ``processes``: FLOP, bytes received, bytes held.

    Fusion with one layer and ffn_dim = D; fragments in numbers of ``size`` bytes, all else float32;
    ``through``: gradients to the fragments (detach_fragments=False). The table in docs/scaling.md.
    """
    pairs = n * n / processes if candidates is None else 2 * n * candidates / processes  # two directions
    blocks = 4 * 4 * (n * n if candidates is None else n * candidates)  # p and S, two directions
    travelling = n * d * size * (min(r, w) if candidates is None else r + w)
    elsewhere = (processes - 1) / processes
    nodes = 2 * n
    projections = 2 * nodes * d * d * 6  # q, k, v, output, two feed-forward
    attention = 2 * 2 * nodes * nodes * d
    cosines = 2 * n * n * d * (6 + 4)  # three cosines, three distances in the graph, four in the pair losses
    return {
        "alignment, FLOP": pairs * 2 * r * w * d * (4 if through else 1),
        "attention and pair losses, FLOP": 3 * (projections + attention + cosines),
        "fragments received, bytes": travelling * elsewhere * (2 if through else 1),
        "p and S received, bytes": blocks * elsewhere,
        "embeddings received, bytes": 2 * n * d * 4 * elsewhere,
        "A and S held, bytes": nodes * nodes * (1 + 4),
        "attention weights of all heads, bytes": heads * nodes * nodes * 4,
    }


def arithmetic_table(per_square: float) -> None:
    n, processes, r, w, d, heads, k = 32768, 256, 36, 32, 1024, 16, 64
    print(f"\n### Arithmetic, nothing measured: N = {n}, {processes} processes, R = {r}, W = {w}, D = {d}, "
          f"{heads} heads, fragments in 2 bytes, fragments detached\n")  # fmt: skip
    columns = {
        "one process, N = 128": step_costs(128, 1, r, w, d, heads=heads, candidates=None, through=False, size=2),
        "dense": step_costs(n, processes, r, w, d, heads=heads, candidates=None, through=False, size=2),
        f"candidates={k}": step_costs(n, processes, r, w, d, heads=heads, candidates=k, through=False, size=2),
    }
    print("| of one process in one step | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name in columns["dense"]:
        print(f"| {name} | " + " | ".join(f"{column[name]:.2g}" for column in columns.values()) + " |")
    if per_square:
        whole = " | ".join(f"{per_square * size**2:.2g}" for size in (128, n, n))
        print(f"| the whole loss at the {per_square:.0f} bytes · N² measured above, bytes | {whole} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--loss-sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--largest-dense-backward", type=int, default=512)
    options = parser.parse_args()
    if options.sizes:
        graph_table(options)
    per_square = loss_table(options) if options.loss_sizes else 0
    arithmetic_table(per_square)


if __name__ == "__main__":
    main()
