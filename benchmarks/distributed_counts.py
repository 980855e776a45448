"""What one process computes and receives in a step of the gathered loss, at 1, 2 and 4 processes.

    python benchmarks/distributed_counts.py      # prints the table of docs/distributed.md

Counted, not timed: multiply-adds (2 FLOP) of the matrix products that torch.profiler sees, with their shapes, and of
the products along neighbour lists; and the bytes that each process receives in the collectives of the library (DDP's or
FSDP's own not included). The global batch stays the same; every process holds an equal part of it. Largest figure over
the processes.

    python benchmarks/distributed_counts.py --memory     # instead: peak memory of a process, dense and with candidates
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _common import extra_peak_mb, where
from torch.profiler import ProfilerActivity, profile, record_function

import hrem_layers.loss
from hrem_layers import ALONE, AssociationGraph, HREMLoss, RelationInteraction, TripletLoss

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1, "mm_out": 0}
ATTENTION = "aten::_scaled_dot_product"


KINDS = ("alignment", "search", "neighbours", "pair losses", "rest")


class WholeGraph(AssociationGraph):
    """Every process gets all fragments and aligns all pairs."""

    def forward(self, v, u, r, c, r_mask=None, c_mask=None, *, exchange=ALONE, **options):
        r, r_mask = exchange.gather_fragments("image", r, r_mask)
        c, c_mask = exchange.gather_fragments("text", c, c_mask)
        return super().forward(v, u, r, c, r_mask, c_mask, **options)


def marked(original):
    """Pair losses, so that their products are known in a profile: streamed, they find their gradient in forward."""

    def loss(*args, **options):
        with record_function("pair losses"):
            return original(*args, **options)

    return loss


def product_flops(name: str, shapes: list) -> int:
    """2 · the multiply-adds of one call, 0 for what is no product."""
    if name.startswith("hrem_layers::neighbor_"):  # (n, h, d) or (n, K, h), then (m or n, h, d), then (n, K)
        return 2 * math.prod(shapes[2]) * math.prod(shapes[1][1:])
    if name.startswith("aten::") and name[6:] in PRODUCTS:
        a, b = shapes[PRODUCTS[name[6:]] :][:2]
        return 2 * math.prod(a) * b[-1]
    if name.startswith(ATTENTION) and "flash" in name and len(shapes) > 2:  # one opaque kernel, two products
        backward = "backward" in name
        q, k = shapes[1:3] if backward else shapes[:2]
        return (5 if backward else 2) * 2 * math.prod(q) * k[-2]
    return 0


def kind_of(event) -> str:
    while event is not None:
        for start, kind in (("align", "alignment"), ("nearest_rows", "search"), ("neighbor", "neighbours")):
            if event.name.startswith(f"hrem_layers::{start}"):
                return kind
        if event.name == "pair losses":
            return event.name
        event = event.cpu_parent
    return "rest"


def counted(work) -> Counter:
    """FLOP of the products in ``work()``, by kind: :data:`KINDS`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        work()
    flops = Counter()
    for event in record.events():
        amount = product_flops(event.name, event.input_shapes)
        if amount:
            flops[kind_of(event)] += amount
    return flops


@contextlib.contextmanager
def received(world: int) -> Iterator[Counter]:
    """Bytes that this process receives, by collective: W - 1 parts in an all-gather and, in the ring of a
    reduce-scatter, as many sums."""
    names = {
        "all-gather": ("all_gather_single", "all_gather_into_tensor"),
        "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
        "all-to-all": ("all_to_all_single",),
        "broadcast": ("broadcast",),
    }
    volume, originals = Counter(), {}

    def others(args, out) -> float:
        """The share of an all-to-all's rows that come from other processes."""
        return 1 - args[1][dist.get_rank()] / max(1, len(out))

    def watch(kind: str, original):
        def call(first, *args, **options):
            part = args[0] if kind == "all-gather" else first
            times = {"broadcast": 1, "all-to-all": others(args, first) if kind == "all-to-all" else 0}
            volume[kind] += int(part.numel() * part.element_size() * times.get(kind, world - 1))
            return original(first, *args, **options)

        return call

    for kind, choices in names.items():
        name = next(name for name in choices if hasattr(dist, name))
        originals[name] = getattr(dist, name)
        setattr(dist, name, watch(kind, originals[name]))
    try:
        yield volume
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def measure(rank: int, world: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    n, r, w, d = options.items // world, options.regions, options.words, options.dim
    results = {}
    pairs = hrem_layers.loss.Pairs
    pairs.loss = marked(pairs.loss)
    for name, graph_type, graph_options in (
        ("every process everything", WholeGraph, {}),
        ("shared", AssociationGraph, {}),
        ("shared, `detach_fragments=False`", AssociationGraph, {"detach_fragments": False}),
        (f"shared, `candidates={options.candidates}`", AssociationGraph, {"candidates": options.candidates}),
    ):
        if options.only and options.only not in name:
            continue
        torch.manual_seed(0)
        loss = HREMLoss(
            d,
            graph=graph_type(**graph_options),
            interaction=RelationInteraction(d, dropout=0.0),
            pair_loss=TripletLoss(negative_sampling="hardest"),
            gather_distributed=True,
        )
        torch.manual_seed(rank)
        inputs = [torch.randn(*shape, requires_grad=True) for shape in ((n, d), (n, d), (n, r, d), (n, w, d))]

        def step(loss=loss, inputs=inputs) -> None:
            loss(*inputs).backward()

        with received(world) as volume:
            flops = counted(step)
        everyone: list = [None] * world
        dist.all_gather_object(everyone, (dict(flops), dict(volume)))
        results[name] = [
            {key: max(counts[place].get(key, 0) for counts in everyone) for key in keys}
            for place, keys in ((0, KINDS), (1, ("all-gather", "all-to-all", "reduce-scatter", "broadcast")))
        ]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def measure_memory(rank: int, world: int, options: argparse.Namespace, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    d, found = options.dim, {}
    for name, candidates in (("dense", None), (f"candidates={options.candidates}", options.candidates)):
        if options.only and options.only not in name:
            continue
        torch.manual_seed(0)
        loss = HREMLoss(
            d, graph=AssociationGraph(candidates=candidates), gather_distributed=True,
            pair_loss=TripletLoss(negative_sampling="hardest"),
        )  # fmt: skip

        def work(n: int, loss=loss):
            shapes = (n, d), (n, d), (n, options.regions, d), (n, options.words, d)
            inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
            return lambda: loss(*inputs).backward()

        work(2 * options.candidates)()
        run = work(options.items // world)
        dist.barrier()
        peak = torch.tensor(extra_peak_mb(run))
        dist.all_reduce(peak, dist.ReduceOp.MAX)
        found[name] = peak.item()
        del run
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def in_processes(work, world: int, options: argparse.Namespace):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, options, folder), nprocs=world)
        return json.loads(Path(folder, "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=256, help="global batch N")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="write the counts to this file too, for scaling_counts.py --check")
    parser.add_argument("--only", help="only graphs whose name has this in it, such as candidates")
    parser.add_argument("--memory", action="store_true", help="peak memory of a process instead of counts")
    options = parser.parse_args()
    torch.set_num_threads(1)  # of each process; said below
    if options.memory:
        print(f"N = {options.items} in all, R = {options.regions}, W = {options.words}, D = {options.dim}\n")
        graphs = [name for name in ("dense", f"candidates={options.candidates}") if (options.only or "") in name]
        print(f"Peak of a process beyond its part of the batch, MB:\n\n| processes | {' | '.join(graphs)} |")
        print("|---" * (1 + len(graphs)) + "|")
        for world in options.processes:
            found = in_processes(measure_memory, world, options)
            print(f"| {world} | {' | '.join(f'{found[name]:.0f}' for name in graphs)} |", flush=True)
        print(f"\n{where()}")
        return
    table: dict[str, dict[int, list]] = {}
    for world in options.processes:
        for name, counts in in_processes(measure, world, options).items():
            table.setdefault(name, {})[world] = counts
    if options.json:
        given = {name: getattr(options, name) for name in ("items", "regions", "words", "dim", "candidates")}
        options.json.write_text(json.dumps({"options": given, "rows": table}))
    n, r, w, d = options.items, options.regions, options.words, options.dim
    print(f"N = {n} in all, R = {r}, W = {w}, D = {d}, float32; forward and backward\n")
    kinds = " | ".join(f"{kind}, GFLOP" for kind in KINDS)
    print(
        f"| graph | processes | {kinds} | received in all-gathers, MB | in all-to-alls, MB | in reduce-scatters, MB |"
    )
    print("|---" * (len(KINDS) + 5) + "|")
    for name, rows in table.items():
        for world, (flops, volume) in rows.items():
            cells = " | ".join(f"{flops[kind] / 1e9:.3g}" for kind in KINDS)
            print(
                f"| {name} | {world} | {cells} | {(volume['all-gather'] + volume['broadcast']) / 1e6:.2f} | "
                f"{volume['all-to-all'] / 1e6:.2f} | {volume['reduce-scatter'] / 1e6:.2f} |"
            )
    print(f"\n{where()}")


if __name__ == "__main__":
    main()
