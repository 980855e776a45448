"""How the cost grows with the batch, dense and with candidates; and arithmetic for a batch no machine here holds.

    python benchmarks/scaling_counts.py --measured          # the tables of docs/scaling.md
    python benchmarks/scaling_counts.py --arithmetic
    python benchmarks/scaling_counts.py --check

Measured: FLOP of matrix products as counted by torch.profiler (see distributed_counts.py), CPU seconds of one call on
one thread, and how far the resident memory of a fresh process rose above what it held before the call. The arithmetic
is done with the formulas in :func:`step_costs`, which --check compares with what is counted in 1, 2 and 4 processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from _common import in_own_process, section, table
from distributed_counts import counted

from hrem_layers import AssociationGraph, HREMLoss, RelationInteraction, TripletLoss

GPU_PART = 2**26
"""Numbers in a part of the candidates' fragments on a GPU, at least: as in hrem_layers/distributed/shares.py."""


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


def graph_table(options: argparse.Namespace) -> str:
    rows = []
    for n in options.sizes:
        for k in (None, *(k for k in options.candidates if k < n)):
            flops, seconds, memory = measure(graph_work, options, n, k)
            training = "not run"
            if k is not None or n <= options.largest_dense_backward:
                training = f"{measure(graph_training_work, options, n, k)[1]:.2f}"
            rows.append([
                str(n), str(k or "none (dense)"), f"{flops.get('alignment', 0) / 1e9:.2f}",
                f"{without_alignment(flops):.3f}", f"{seconds:.2f}", f"{memory / 1e6:.0f}", training,
            ])  # fmt: skip
            print(*rows[-1], file=sys.stderr, flush=True)
    return table(
        ["N", "candidates", "alignment, GFLOP", "other products, GFLOP", "forward, CPU s", "memory, MB",
         "forward and backward to the fragments, CPU s"], rows,
    )  # fmt: skip


def loss_table(options: argparse.Namespace) -> str:
    rows = []
    for n in options.loss_sizes:
        for k in (None, options.candidates[0]):
            flops, seconds, memory = measure(loss_work, options, n, k)
            rows.append([
                str(n), str(k or "none (dense)"), f"{flops['alignment'] / 1e9:.2f}", f"{without_alignment(flops):.2f}",
                f"{seconds:.2f}", f"{memory / 1e6:.0f}", f"{memory / n**2:.0f}",
            ])  # fmt: skip
            print(*rows[-1], file=sys.stderr, flush=True)
    return table(
        ["N", "candidates", "alignment, GFLOP", "the rest, GFLOP", "CPU s", "memory, MB", "memory / N², bytes"], rows
    )


def print_measured(options: argparse.Namespace) -> None:
    r, w, d = options.regions, options.words, options.dim
    torch.set_num_threads(1)
    section(
        "Measured: the dense graph beside lists",
        f"R = {r}, Wd = {w}, D = {d}, no padding, one thread; memory is what one call added, in a process of its own. "
        "AssociationGraph:",
        graph_table(options),
        "The whole loss, fusion, 16 heads, hardest negatives, forward and backward:",
        loss_table(options),
    )


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
    part = max(n / (4 * processes), GPU_PART / (max(r, w) * d))  # of candidates: what comes at one time
    fetched = min(1, k / processes) if sparse else 1  # at most: two rows may have one candidate
    held = min(fetched * n, n if through or processes == 1 or not sparse else part)
    received = {
        "fragments received": fetched * n * d * size * (r + w if sparse else min(r, w)) * (2 if through else 1),
        "p and S received": 0 if sparse else 4 * 4 * n * n,
        # the embeddings; keys and values, in backward again; enhanced
        "embeddings and their like received": embeddings * (1 + (2 + 2 + 1 if sparse else 0)),
        # keys and values, distances (float64), four pair losses
        "their gradients received": embeddings * (2 + 2 + 4) if sparse else 0,
    }
    return {
        "alignment, FLOP": pairs * 2 * r * w * d * (4 if through else 1),
        "cosines to find neighbours, FLOP (float64)": 2 * d * (4 * n * n if sparse else 3 * n * n) / shared,
        # attention: 2 and 4 more in backward, over both blocks; distances within 4, as forward twice; the guide across
        "attention, distances, guide, FLOP": 2
        * nodes
        * d
        * ((6 * 2 + 4 + 1) * k if sparse else 6 * nodes + 3 * n)
        / shared,
        # four losses; streamed, images and texts each compute their own similarities
        "pair losses, FLOP": 4 * 3 * (2 if sparse else 1) * 2 * n * n * d / shared,
        "projections and feed-forward, FLOP": 3 * 6 * 2 * nodes * d * d / shared,
        **{f"{name}, bytes": volume * elsewhere for name, volume in received.items()},
        "fragments of one modality, received and normalised, bytes": held * max(r, w) * d * (size + 4),
        "A and S held, bytes": nodes * (2 * k * (8 + 4 + 1) / processes if sparse else nodes * (4 + 1)),
        "attention weights of all heads, bytes": heads * nodes * (2 * k / processes if sparse else nodes) * 4,
    }


def print_arithmetic() -> None:
    n, processes, r, w, d, heads, k = 32768, 256, 36, 32, 1024, 16, 64
    sizes = {
        "one process, N = 128": (128, 1, None), "dense": (n, processes, None), f"candidates={k}": (n, processes, k),
    }  # fmt: skip
    columns = [
        step_costs(n, p, r, w, d, heads=heads, candidates=k, through=False, size=2) for n, p, k in sizes.values()
    ]
    flop = [sum(x for name, x in column.items() if "FLOP" in name) for column in columns]
    volume = [sum(x for name, x in column.items() if name.endswith("received, bytes")) for column in columns]
    totals = {
        "**all FLOP**": flop,
        "**all bytes received**": volume,
        "**s at 10¹⁴ FLOP and 25·10⁹ bytes per second, one after the other**": [
            f / 1e14 + b / 25e9 for f, b in zip(flop, volume, strict=True)
        ],
    }
    values = {**{name: [column[name] for column in columns] for name in columns[0]}, **totals}
    section(
        "A global batch of 32,768 on 256 GPUs",
        f"Arithmetic, nothing measured: N = {n:,}, {processes} processes, R = {r}, Wd = {w}, D = {d}, {heads} heads, "
        "fragments in 2 bytes, fragments detached.",
        table(
            ["of one process in one step", *sizes], [[name, *(f"{x:.2g}" for x in row)] for name, row in values.items()]
        ),
    )


def count_in_processes() -> dict:
    """What distributed_counts.py counts with candidates."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "counts.json")
        script = Path(__file__).with_name("distributed_counts.py")
        in_own_process(str(script), "--only", "candidates", "--json", str(file))
        return json.loads(file.read_text(encoding="utf-8"))


def print_check() -> None:
    found = count_in_processes()
    given, rows = found["options"], []
    (counts,) = found["rows"].values()
    for world, (flops, volume, _) in counts.items():
        costs = step_costs(
            given["items"], int(world), given["regions"], given["words"], given["dim"], heads=16,
            candidates=given["candidates"], through=False, size=4,
        )  # fmt: skip
        align, search, near, pairs, rest = (x for name, x in costs.items() if "FLOP" in name)
        received = [x for name, x in costs.items() if "received, bytes" in name]
        for kind, counted_, formula in (
            ("alignment", flops["alignment"], align), ("search", flops["search"], search),
            ("neighbours", flops["neighbours"], near), ("pair losses (formula: at most)", flops["pair losses"], pairs),
            ("projections", flops["rest"], rest), ("all-gathers", volume["all-gather"], received[2]),
            ("all-to-alls (formula: at most)", volume["all-to-all"], received[0]),
            ("reduce-scatters", volume["reduce-scatter"], received[3]),
        ):  # fmt: skip
            ratio = f"{counted_ / formula:.3f}" if formula else "-"
            rows.append([world, kind, f"{counted_:.4g}", f"{formula:.4g}", ratio])
    section(
        "The formulas beside what is counted",
        f"N = {given['items']}, R = {given['regions']}, Wd = {given['words']}, D = {given['dim']}, "
        f"candidates={given['candidates']}, float32, one process of so many: FLOP, and bytes received.",
        table(["processes", "work", "counted", "formula", "counted / formula"], rows),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--measured", action="store_true", help="the growth of graph and loss on one process")
    what.add_argument("--arithmetic", action="store_true", help="a batch that no machine here holds")
    what.add_argument("--check", action="store_true", help="the formulas beside counts in 1, 2 and 4 processes")
    parser.add_argument("--sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--loss-sizes", type=int, nargs="*", default=[128, 256, 512, 1024])
    parser.add_argument("--candidates", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--largest-dense-backward", type=int, default=512)
    options = parser.parse_args()
    if options.measured:
        print_measured(options)
    elif options.arithmetic:
        print_arithmetic()
    else:
        print_check()


if __name__ == "__main__":
    main()
