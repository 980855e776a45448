"""What one process computes and receives in a step of the gathered loss, at 1, 2 and 4 processes.

    python benchmarks/distributed_counts.py      # prints the table of docs/distributed.md

Counted, not timed: multiply-adds (2 FLOP) of the matrix products that torch.profiler sees, with their shapes,
and the bytes that each process receives in the collectives of the library (DDP's or FSDP's own not included).
The global batch stays the same; every process holds an equal part of it. Largest figure over the processes.
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
from torch.profiler import ProfilerActivity, profile

from hrem_layers import AssociationGraph, HREMLoss, RelationInteraction, TripletLoss

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1, "mm_out": 0}
ATTENTION = "aten::_scaled_dot_product"


class WholeGraph(AssociationGraph):
    """Without the keyword ``shares``: every process gets all fragments and aligns all pairs."""

    def forward(self, v, u, r, c, r_mask=None, c_mask=None):
        return super().forward(v, u, r, c, r_mask, c_mask)


def product_flops(name: str, shapes: list) -> int:
    """2 · the multiply-adds of one call, 0 for what is no matrix product."""
    if name.startswith("aten::") and name[6:] in PRODUCTS:
        a, b = shapes[PRODUCTS[name[6:]] :][:2]
        return 2 * math.prod(a) * b[-1]
    if name.startswith(ATTENTION) and "flash" in name and len(shapes) > 2:  # one opaque kernel, two products
        backward = "backward" in name
        q, k = shapes[1:3] if backward else shapes[:2]
        return (5 if backward else 2) * 2 * math.prod(q) * k[-2]
    return 0


def counted(work) -> Counter:
    """FLOP of the matrix products in ``work()``, those inside the alignment apart."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        work()
    flops = Counter()
    for event in record.events():
        amount = product_flops(event.name, event.input_shapes)
        if amount:
            above = event
            while above is not None and not above.name.startswith("hrem_layers::align"):
                above = above.cpu_parent
            flops["rest" if above is None else "alignment"] += amount
    return flops


@contextlib.contextmanager
def received(world: int) -> Iterator[Counter]:
    """Bytes that this process receives, by collective: W - 1 parts in an all-gather and, in the ring of a
    reduce-scatter, as many sums."""
    names = {
        "all-gather": ("all_gather_single", "all_gather_into_tensor"),
        "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
        "broadcast": ("broadcast",),
    }
    volume, originals = Counter(), {}

    def watch(kind: str, original):
        def call(first, *args, **options):
            part = args[0] if kind == "all-gather" else first
            volume[kind] += part.numel() * part.element_size() * (1 if kind == "broadcast" else world - 1)
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
    for name, graph_type, graph_options in (
        ("every process everything", WholeGraph, {}),
        ("shared", AssociationGraph, {}),
        ("shared, `detach_fragments=False`", AssociationGraph, {"detach_fragments": False}),
        (f"shared, `candidates={options.candidates}`", AssociationGraph, {"candidates": options.candidates}),
    ):
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
            for place, keys in ((0, ("alignment", "rest")), (1, ("all-gather", "reduce-scatter", "broadcast")))
        ]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=256, help="global batch N")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    options = parser.parse_args()
    table: dict[str, dict[int, list]] = {}
    for world in options.processes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure, (world, options, folder), nprocs=world)
            for name, counts in json.loads(Path(folder, "results.json").read_text()).items():
                table.setdefault(name, {})[world] = counts
    n, r, w, d = options.items, options.regions, options.words, options.dim
    print(f"N = {n} in all, R = {r}, W = {w}, D = {d}, float32; forward and backward\n")
    print(
        "| alignment | processes | alignment, GFLOP a process | the rest, GFLOP a process | "
        "received in all-gathers, MB a process | received in reduce-scatters, MB a process |"
    )
    print("|---|---|---|---|---|---|")
    for name, rows in table.items():
        for world, (flops, volume) in rows.items():
            print(
                f"| {name} | {world} | {flops['alignment'] / 1e9:.2f} | {flops['rest'] / 1e9:.2f} | "
                f"{(volume['all-gather'] + volume['broadcast']) / 1e6:.2f} | {volume['reduce-scatter'] / 1e6:.2f} |"
            )


if __name__ == "__main__":
    main()
