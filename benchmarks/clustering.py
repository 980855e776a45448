"""CPU time and inertia of ``cluster_features`` against faiss and scikit-learn's own k-means, on one thread.

    python benchmarks/clustering.py                 # 29,000 x 128 features, 453 clusters
    python benchmarks/clustering.py --scale 0.1     # a tenth of the images and clusters, to try it out

Inertia is the mean squared distance of the rows to the mean of their cluster, computed alike for all from the labels.
Peers run with their default options. *At equal inertia* compares a peer with ours after the fewest iterations
(``max_iter``, of some numbers up to 20) whose inertia is not above the peer's by more than 0.1%; a ratio below 1 says
that ours takes less time. Times are processor time, in turn, the best of ``--repeats``.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from collections.abc import Callable

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import sklearn
from _common import section, table
from sklearn.cluster import KMeans, MiniBatchKMeans
from threadpoolctl import threadpool_limits

from hrem_layers.sampler.clustering import cluster_features

DEFAULT_ITERATIONS = 10
ITERATIONS = [1, 2, 3, 5, DEFAULT_ITERATIONS, 15, 20]
Engine = Callable[[np.ndarray, int], np.ndarray]  # features and number of clusters -> labels


def faiss_labels(features: np.ndarray, number: int) -> np.ndarray:
    import faiss

    means = faiss.Kmeans(features.shape[1], number, seed=0)
    means.train(features)
    return means.assign(features)[1]


def ours(iterations: int) -> Engine:
    return lambda features, number: cluster_features(features, number, max_iter=iterations)


PEERS: dict[str, Engine] = {
    "faiss.Kmeans": faiss_labels,
    "MiniBatchKMeans": lambda features, number: MiniBatchKMeans(number, random_state=0).fit_predict(features),
    "KMeans": lambda features, number: KMeans(number, random_state=0).fit_predict(features),
}


def make_features(kind: str, images: int, clusters: int, dimensions: int = 128) -> np.ndarray:
    random = np.random.default_rng(0)
    noise = random.standard_normal((images, dimensions), np.float32)
    if kind == "noise":
        return noise
    if kind.startswith("clusters"):
        centres = random.standard_normal((clusters, dimensions), np.float32)
        return centres[random.integers(0, clusters, images)] + (0.3 if "apart" in kind else 1.0) * noise
    # as image features: many themes of very different frequency, a falling spectrum, unit length
    themes = 4 * clusters
    often = 1 / (10 + np.arange(themes))
    which = random.choice(themes, images, p=often / often.sum())
    spectrum = (1 + np.arange(dimensions)) ** -0.6
    features = (random.standard_normal((themes, dimensions))[which] + 0.9 * noise) * spectrum
    return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)


KINDS = ["noise", "clusters that overlap", "clusters far apart", "themes"]


def inertia(features: np.ndarray, labels: np.ndarray) -> float:
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    sizes = sizes[sizes > 0]
    starts = np.cumsum(sizes) - sizes
    sums = np.add.reduceat(features[order].astype(np.float64), starts)
    total = np.square(features, dtype=np.float64).sum() - (np.square(sums) / sizes[:, None]).sum()
    return float(total / len(features))


def measure(engines: dict[str, Engine], features: np.ndarray, number: int, repeats: int) -> dict[str, list[float]]:
    """Seconds and inertia."""
    found: dict[str, list[float]] = {name: [np.inf, 0.0] for name in engines}
    for _ in range(repeats):
        for name, engine in engines.items():
            start = time.process_time()
            labels = engine(features, number)
            found[name] = [min(found[name][0], time.process_time() - start), inertia(features, labels)]
    return found


def rows_of(kind: str, images: int, number: int, repeats: int) -> list[list[str]]:
    features = make_features(kind, images, number)
    found = measure({**PEERS, **{str(i): ours(i) for i in ITERATIONS}}, features, number, repeats)
    default_time, default_inertia = found[str(DEFAULT_ITERATIONS)]
    rows = []
    for name in PEERS:
        seconds, value = found[name]
        enough = [str(i) for i in ITERATIONS if found[str(i)][1] <= 1.001 * value]
        equal = f"{found[enough[0]][0] / seconds:.2f} ({enough[0]})" if enough else "not reached"
        rows.append([
            kind, name, f"{seconds:.2f}", f"{default_time / seconds:.2f}", f"{default_inertia / value:.4f}", equal,
        ])  # fmt: skip
    return rows


HEAD = ["features", "peer", "peer CPU s", "CPU, ours / peer", "inertia, ours / peer", "CPU at equal inertia (max_iter)"]


def paragraphs(scale: float, repeats: int) -> list[str]:
    """What the page says of k-means; one thread only inside :func:`threadpool_limits`."""
    images, number = (max(2, round(size * scale)) for size in (29_000, 453))
    import faiss

    faiss.omp_set_num_threads(1)
    warnings.simplefilter("ignore")  # of KMeans, on convergence
    rows = [row for kind in KINDS for row in rows_of(kind, images, number, repeats)]
    return [
        f"k-means: {images:,} x 128 float32 features, {number} clusters, one thread; peers with their default options.",
        table(HEAD, rows),
        f"faiss {faiss.__version__}, scikit-learn {sklearn.__version__}, {time.strftime('%Y-%m-%d')}.",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=1.0, help="images and clusters times this")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with threadpool_limits(limits=1):
        found = paragraphs(arguments.scale, arguments.repeats)
    section("k-means", *found)


if __name__ == "__main__":
    main()
