"""How long NeighborBatchSampler takes at scale, and in how much memory.

    python benchmarks/sampler_scale.py order        # an epoch's order for 10 million captions
    python benchmarks/sampler_scale.py clusters     # k-means of 1,000,000 x 256 features into 1,000 clusters

Every row is measured in a process of its own. Memory (on Linux) is the peak of the resident set, imports and all. For
``clusters`` that counts pages of the memory-mapped file, too, as long as nobody else needs their place; "anonymous" is
the peak without them. ``clusters`` writes 1 GB to a temporary folder and deletes it. CPU seconds are what counts where
other work runs on the machine.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import sklearn
import torch

from hrem_layers import NeighborBatchSampler
from hrem_layers.clustering import cluster_features

ORDERS = [  # images, clusters, captions an image, clusters and images a batch, ranks
    (2_000_000, 16_000, 5, 8, 16, 1),
    (2_000_000, 16_000, 5, 8, 16, 256),
    (2_000_000, 500_000, 5, 8, 16, 1),
    (10_000_000, 80_000, 1, 8, 16, 1),
    (2_000_000, 16_000, 5, 128, 1, 1),
]


def order(images: int, clusters: int, captions: int, per_batch: int, per_cluster: int, ranks: int) -> dict[str, object]:
    labels = np.random.default_rng(0).integers(0, clusters, images)
    start = time.perf_counter()
    sampler = NeighborBatchSampler(
        cluster_ids=labels, captions_per_image=captions, clusters_per_batch=per_batch,
        images_per_cluster=per_cluster, num_replicas=ranks, rank=0,
    )  # fmt: skip
    made, cpu = time.perf_counter(), time.process_time()
    batches = iter(sampler)
    next(batches)
    arranged, cpu = time.perf_counter(), time.process_time() - cpu
    rest = sum(1 for _ in batches)
    done = time.perf_counter()
    return {
        "images": images, "clusters": clusters, "captions": images * captions,
        "P x K x ranks": f"{per_batch} x {per_cluster} x {ranks}",
        "constructor s": made - start, "order s": arranged - made, "order CPU s": cpu,
        "us a batch": 1e6 * (done - arranged) / max(rest, 1),
    }  # fmt: skip


def clusters(images: int, dimensions: int, number: int, folder: str) -> dict[str, object]:
    features = np.load(f"{folder}/features.npy", mmap_mode="r")
    start, cpu = time.perf_counter(), time.process_time()
    labels = cluster_features(features, number)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {
        "images": images, "dimensions": dimensions, "clusters": number, "s": seconds, "CPU s": cpu,
        "smallest": int(np.bincount(labels, minlength=number).min()),
        "largest": int(np.bincount(labels).max()),
    }  # fmt: skip


def write_features(images: int, dimensions: int, number: int, folder: str) -> None:
    """Around ``number`` centres, not well separated."""
    random = np.random.default_rng(0)
    centres = random.standard_normal((number, dimensions), np.float32)
    file = np.lib.format.open_memmap(f"{folder}/features.npy", "w+", np.float32, (images, dimensions))
    for low in range(0, images, 50_000):
        which = random.integers(0, number, min(50_000, images - low))
        file[low : low + 50_000] = centres[which] + 1.5 * random.standard_normal((len(which), dimensions), np.float32)
    file.flush()


def measured(measure: Callable[..., dict[str, object]], arguments: tuple, pipe: Connection) -> None:
    stop, anonymous = threading.Event(), [0]

    def status(name: str) -> int:
        return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0])

    def watch() -> None:
        while not stop.wait(0.05):
            anonymous[0] = max(anonymous[0], status("RssAnon"))

    watcher = threading.Thread(target=watch, daemon=True)
    if sys.platform == "linux":
        watcher.start()
    row = measure(*arguments)
    stop.set()
    if sys.platform == "linux":
        row["peak GB"], row["anonymous GB"] = status("VmHWM") * 1024 / 1e9, anonymous[0] * 1024 / 1e9
    pipe.send(row)


def in_a_process(measure: Callable[..., dict[str, object]], *arguments: object) -> dict[str, object]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=measured, args=(measure, arguments, there))
    process.start()
    there.close()
    row = here.recv()
    process.join()
    return row


def table(rows: list[dict[str, object]]) -> str:
    cells = [list(rows[0])] + [[f"{x:.2f}" if isinstance(x, float) else f"{x}" for x in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(x.rjust(width) for x, width in zip(line, widths, strict=True)) + " |" for line in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["order", "clusters"])
    parser.add_argument("--images", type=int, default=1_000_000, help="for clusters")
    parser.add_argument("--dimensions", type=int, default=256, help="for clusters")
    parser.add_argument("--number", type=int, default=1_000, help="for clusters: how many")
    arguments = parser.parse_args()
    if arguments.what == "order":
        rows = [in_a_process(order, *case) for case in ORDERS]
    else:
        with tempfile.TemporaryDirectory() as folder:
            size = (arguments.images, arguments.dimensions, arguments.number, folder)
            write_features(*size)
            rows = [in_a_process(clusters, *size)]
    print(f"$ python {shlex.join(sys.argv)}")
    print(
        f"{platform.machine()}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, numpy {np.__version__}, scikit-learn {sklearn.__version__}, "
        f"torch {torch.__version__}"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
