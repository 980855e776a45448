"""What one process computes, receives and holds in a step of the gathered loss, at 1, 2 and 4 processes.

    python benchmarks/distributed_counts.py              # work and bytes by kind, at a small size
    python benchmarks/distributed_counts.py --memory     # all work, all bytes and peak memory, at a larger size

Counted, not timed: multiply-adds (2 FLOP) of the matrix products that torch.profiler sees, with their shapes, and of
the products along neighbour lists; the bytes that each process receives in the collectives of the library (DDP's or
FSDP's own not included); and the bytes of tensors at the peak, beside which what is resident is measured. The global
batch stays the same; every process holds an equal part of it. Largest figure over the processes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _common import extra_peak_mb, recorded_peak_mb, section, table
from torch.profiler import ProfilerActivity, profile, record_function

import hrem_layers.loss
from hrem_layers import ALONE, AssociationGraph, HREMLoss, RelationInteraction, TripletLoss
from hrem_layers.losses import _streamed

PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1, "addmm_": 1, "baddbmm_": 1, "mm_out": 0}
ATTENTION = "aten::_scaled_dot_product"

COLLECTIVES = ("all-gather", "all-to-all", "reduce-scatter", "broadcast")
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


def counted(work: Callable[[], object]) -> Counter:
    """FLOP of the products in ``work()``, by kind: :data:`KINDS`."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as record:
        work()
    return recorded_flops(record)


def recorded_flops(record: profile) -> Counter:
    """:func:`counted` of a profile that was made with ``record_shapes=True``."""
    flops = Counter()
    for event in record.events():
        amount = product_flops(event.name, event.input_shapes)
        if amount:
            flops[kind_of(event)] += amount
    return flops


NAMES = {
    "all-gather": ("all_gather_single", "all_gather_into_tensor"),
    "reduce-scatter": ("reduce_scatter_single", "reduce_scatter_tensor"),
    "all-to-all": ("all_to_all_single",),
    "broadcast": ("broadcast",),
}  # torch 2.13 renamed two of them


@contextlib.contextmanager
def each_collective(wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Inside, ``wrap(kind, original)`` is called in the place of every collective."""
    originals = {}
    for kind, choices in NAMES.items():
        name = next(name for name in choices if hasattr(dist, name))
        originals[name] = getattr(dist, name)
        setattr(dist, name, wrap(kind, originals[name]))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


@contextlib.contextmanager
def received(world: int) -> Iterator[Counter]:
    """Bytes that this process receives, by collective: W - 1 parts in an all-gather and, in the ring of a
    reduce-scatter, as many sums."""
    volume = Counter()

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

    with each_collective(watch):
        yield volume


def settled(_kind: str, original: Callable) -> Callable:
    """A collective that ends when gloo's threads have let go of its tensors: the profiler does not see what these
    free, and who lets go last is a race."""

    def holders(x: torch.Tensor) -> int:
        return x._use_count() + torch._C._storage_Use_Count(x.untyped_storage()._cdata)

    def call(*args, **options):
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        before = [holders(x) for x in tensors]
        result = original(*args, **options)
        while any(holders(x) > held for x, held in zip(tensors, before, strict=True)):
            time.sleep(1e-5)
        return result

    return call


def graphs(options: argparse.Namespace) -> dict[str, AssociationGraph]:
    sparse = AssociationGraph(candidates=options.candidates)
    name = f"`candidates={options.candidates}`"
    if options.memory:
        return {"dense": AssociationGraph(), name: sparse}
    return {
        "every process everything": WholeGraph(),
        "shared": AssociationGraph(),
        "shared, `detach_fragments=False`": AssociationGraph(detach_fragments=False),
        f"shared, {name}": sparse,
    }


def measure(rank: int, world: int, options: argparse.Namespace, name: str, folder: str) -> None:
    """Of one graph: FLOP by kind, bytes by collective and, with --memory, MB beyond model and batch: resident ones and
    those of tensors."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world)
    pairs = hrem_layers.loss.Pairs
    pairs.loss = marked(pairs.loss)
    if not options.memory:
        _streamed.CPU_TILE = 1  # more than one chunk of anchors, as of a large batch: one holds both ways at once
    torch.manual_seed(0)
    loss = HREMLoss(
        options.dim,
        graph=graphs(options)[name],
        interaction=RelationInteraction(options.dim, dropout=0.0),
        pair_loss=TripletLoss(negative_sampling="hardest"),
        gather_distributed=True,
    )
    torch.manual_seed(rank)

    items = options.dense_items if name == "dense" else options.items

    def work(n: int):
        shapes = (n, options.dim), (n, options.dim), (n, options.regions, options.dim), (n, options.words, options.dim)
        inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
        wanted = [*inputs, *loss.parameters()]  # leaves no gradients behind, which another step would add to
        return lambda: torch.autograd.grad(loss(*inputs), wanted, allow_unused=True)

    peak = 0.0
    if options.memory:
        work(2 * options.candidates)()  # loads what is loaded at the first call
    step = work(items // world)
    if options.memory:
        dist.barrier()
        peak = extra_peak_mb(step)
    recording = profile(activities=[ProfilerActivity.CPU], record_shapes=True, profile_memory=True)
    with received(world) as volume, each_collective(settled), recording as record:
        step()
    own = dict(recorded_flops(record)), dict(volume), {"tensors": recorded_peak_mb(record), "peak": peak}
    everyone: list = [None] * world
    dist.all_gather_object(everyone, own)
    places = enumerate((KINDS, COLLECTIVES, ("tensors", "peak")))
    largest = [{key: max(counts[place].get(key, 0) for counts in everyone) for key in keys} for place, keys in places]
    if rank == 0:
        Path(folder, "results.json").write_text(json.dumps(largest))
    dist.barrier()  # who leaves while others still talk to it ends them
    dist.destroy_process_group()


def in_processes(world: int, options: argparse.Namespace, name: str) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, (world, options, name, folder), nprocs=world)
        return json.loads(Path(folder, "results.json").read_text())


def by_kind(found: dict[str, dict[int, list]]) -> str:
    head = ["graph", "processes", *(f"{kind}, GFLOP" for kind in KINDS), "received in all-gathers, MB",
            "in all-to-alls, MB", "in reduce-scatters, MB"]  # fmt: skip
    rows = []
    for name, counts in found.items():
        for world, (flops, volume, _) in counts.items():
            gathered = volume["all-gather"] + volume["broadcast"], volume["all-to-all"], volume["reduce-scatter"]
            rows.append([
                name, str(world), *(f"{flops[kind] / 1e9:.3g}" for kind in KINDS),
                *(f"{x / 1e6:.2f}" for x in gathered),
            ])  # fmt: skip
    return table(head, rows)


def per_process(found: dict[str, dict[int, list]], options: argparse.Namespace) -> str:
    """All products, all bytes, the peaks; in brackets over those of the first number of processes."""
    rows = []
    for name, counts in found.items():
        items = options.dense_items if name == "dense" else options.items
        whole = items * (2 + options.regions + options.words) * options.dim * 4 / 1e6
        first = next(iter(counts.values()))
        for world, (flops, volume, memory) in counts.items():
            work, base, got = sum(flops.values()), sum(first[0].values()), sum(volume.values())
            peaks = [f"{memory[kind]:.0f} ({memory[kind] / first[2][kind]:.2f})" for kind in ("tensors", "peak")]
            rows.append([
                name, f"{items:,}", str(world), f"{work / 1e9:.4g} ({work / base:.2f})", f"{got / 1e6:.0f}",
                *peaks, f"{whole / world:.0f}",
            ])  # fmt: skip
    head = ["graph", "N", "processes", "products, GFLOP", "received, MB", "tensors, MB", "resident, MB",
            "part of the batch, MB"]  # fmt: skip
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, help="global batch N [256; with --memory 8192]")
    parser.add_argument("--dense-items", type=int, default=1024, help="with --memory, N of the dense graph")
    parser.add_argument("--regions", type=int, default=36)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--dim", type=int, help="[64; with --memory 256]")
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path, help="write the counts to this file too, for scaling_counts.py --check")
    parser.add_argument("--only", default="", help="only graphs whose name has this in it, such as candidates")
    parser.add_argument("--memory", action="store_true", help="peak memory of a process too, at a larger size")
    options = parser.parse_args()
    options.items = options.items or (8192 if options.memory else 256)
    options.dim = options.dim or (256 if options.memory else 64)
    torch.set_num_threads(1)
    found: dict[str, dict[int, list]] = {}
    for name in (name for name in graphs(options) if options.only in name):
        found[name] = {world: in_processes(world, options, name) for world in options.processes}
    if options.json:
        given = {name: getattr(options, name) for name in ("items", "regions", "words", "dim", "candidates")}
        options.json.write_text(json.dumps({"options": given, "rows": found}))
    size = (
        f"R = {options.regions}, W = {options.words}, D = {options.dim}, float32; one step, forward and backward; per "
        "process."
    )
    if options.memory:
        section(
            "Work, bytes and memory of a process",
            f"{size} N is that of all. In brackets: over one process. Memory at the peak, beyond model and batch, each "
            "in processes of their own: *tensors* counted, as PyTorch's allocator was asked for them; *resident* "
            "measured, with what the C library keeps and what MKL and gloo take.",
            per_process(found, options),
        )
    else:
        section("Work and bytes of a process, by kind", f"N = {options.items:,} in all, {size}", by_kind(found))


if __name__ == "__main__":
    main()
