"""How long NeighborBatchSampler takes at scale, and in how much memory.

    python benchmarks/sampler_scale.py order        # an epoch's order for 10 million captions
    python benchmarks/sampler_scale.py clusters     # k-means of 1,000,000 x 256 features into 1,000 clusters

``--scale 0.01`` takes a hundredth of the images and clusters, to try it out. ``clusters`` writes 1 GB to a temporary
folder and deletes it. Threads are those of ``OMP_NUM_THREADS``. Linux only, for the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time

import numpy as np
import sklearn
from _common import in_own_process, section, status_kib, table

from hrem_layers import NeighborBatchSampler
from hrem_layers.sampler.clustering import cluster_features

ORDERS = [  # images, clusters, captions per image, clusters and images per batch, ranks
    (2_000_000, 16_000, 5, 8, 16, 1),
    (2_000_000, 16_000, 5, 8, 16, 256),
    (2_000_000, 500_000, 5, 8, 16, 1),
    (10_000_000, 80_000, 1, 8, 16, 1),
    (2_000_000, 16_000, 5, 128, 1, 1),
]
DIMENSIONS = 256
FEATURES = {"around the centres": 1.0, "noise": 0.0}  # the centres' standard deviation; the noise's is 1.5


def order(images: int, clusters: int, captions: int, per_batch: int, per_cluster: int, ranks: int) -> list[str]:
    labels = np.random.default_rng(0).integers(0, clusters, images)
    objects, start = sys.getallocatedblocks(), time.perf_counter()
    sampler = NeighborBatchSampler(
        cluster_ids=labels, captions_per_image=captions, clusters_per_batch=per_batch,
        images_per_cluster=per_cluster, num_replicas=ranks, rank=0,
    )  # fmt: skip
    made, cpu = time.perf_counter(), time.process_time()
    batches = iter(sampler)
    next(batches)
    arranged, cpu = time.perf_counter(), time.process_time() - cpu
    objects = sys.getallocatedblocks() - objects
    rest = sum(1 for _ in batches)
    done = time.perf_counter()
    return [
        f"{images:,}", f"{clusters:,}", f"{images * captions:,}", f"{per_batch} x {per_cluster} x {ranks}",
        f"{made - start:.2f}", f"{arranged - made:.2f}", f"{cpu:.2f}", f"{objects:,}",
        f"{1e6 * (done - arranged) / max(rest, 1):.0f}", peak(),
    ]  # fmt: skip


ORDER_HEAD = [
    "images", "clusters", "captions", "P x K x ranks", "constructor s", "order s", "order CPU s", "Python objects",
    "µs per batch", "peak GB",
]  # fmt: skip


def cluster(kind: str, file: str, number: int) -> list[str]:
    features = np.load(file, mmap_mode="r")
    start, cpu = time.perf_counter(), time.process_time()
    labels = cluster_features(features, number)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    sizes = np.bincount(labels, minlength=number)
    return [
        kind, f"{len(features):,}", f"{features.shape[1]}", f"{number:,}", f"{seconds:.0f}", f"{cpu:.0f}",
        f"{sizes.min()} to {sizes.max()}", peak(),
    ]  # fmt: skip


CLUSTERS_HEAD = ["features", "images", "dimensions", "clusters", "s", "CPU s", "images per cluster", "peak GB"]


def peak() -> str:
    return f"{status_kib('VmHWM') * 1024 / 1e9:.2f}"


def write_features(file: str, images: int, number: int, apart: float) -> None:
    """Normal noise around ``number`` centres."""
    random = np.random.default_rng(0)
    centres = apart * random.standard_normal((number, DIMENSIONS), np.float32)
    rows = np.lib.format.open_memmap(file, "w+", np.float32, (images, DIMENSIONS))
    for low in range(0, images, 50_000):
        which = random.integers(0, number, min(50_000, images - low))
        rows[low : low + 50_000] = centres[which] + 1.5 * random.standard_normal((len(which), DIMENSIONS), np.float32)
    rows.flush()


def row(what: str, *arguments: object) -> list[str]:
    return json.loads(in_own_process(__file__, "--one", json.dumps([what, *arguments]), timeout=3600))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["order", "clusters"], nargs="?")
    parser.add_argument("--scale", type=float, default=1.0, help="images and clusters times this")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        what, *given = json.loads(arguments.one)
        print(json.dumps({"order": order, "clusters": cluster}[what](*given)))
        return

    def scaled(number: int) -> int:
        return max(1, round(number * arguments.scale))

    if arguments.what == "order":
        rows = [row("order", scaled(images), scaled(clusters), *others) for images, clusters, *others in ORDERS]
        section(
            "The order of an epoch",
            "*Order* is the time from `iter(sampler)` to the first batch; *Python objects* are the blocks that Python "
            "holds more then than before the constructor; *µs per batch* is that of the rest of the epoch; *peak* is "
            "the resident memory of the whole process, imports included.",
            table(ORDER_HEAD, rows),
            versions(),
        )
    elif arguments.what == "clusters":
        with tempfile.TemporaryDirectory() as folder:
            images, number = scaled(1_000_000), scaled(1_000)
            file = os.path.join(folder, "features.npy")
            rows = []
            for kind, apart in FEATURES.items():
                write_features(file, images, number, apart)
                rows.append(row("clusters", kind, file, number))
        section(
            "Clustering",
            "`cluster_features` on a memory-mapped file of float32, normal noise around as many centres as clusters or "
            "around none; *peak* is the resident memory of the whole process, imports and those pages of the file "
            "included that were not given back.",
            table(CLUSTERS_HEAD, rows),
            versions(),
        )
    else:
        parser.error("say what: order or clusters")


def versions() -> str:
    return f"numpy {np.__version__}, scikit-learn {sklearn.__version__}, {time.strftime('%Y-%m-%d')}."


if __name__ == "__main__":
    main()
