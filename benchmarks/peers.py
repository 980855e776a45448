"""Every peer in one command: processor time of ours over that of the other, one thread, in turn.

    pip install 'hrem-layers[peers]' faiss-cpu
    python benchmarks/peers.py            # ten minutes
    python benchmarks/peers.py --quick    # small sizes, to see that all of it runs

A ratio below 1 says that ours takes less time. Peers whose package is missing are named and left out.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # also that of scikit-learn and faiss, read when they are imported

import clustering
import pair_losses
import retrieval_speed
import torch
import torch.nn.functional as F
from _baselines import dense, per_caption
from _common import RELEASE, Batch, make_batch, options, seconds_in_turn, section, table
from threadpoolctl import threadpool_limits
from torch import Tensor

from hrem_layers import NeighborBatchSampler, align_fragments
from hrem_layers.retrieval import retrieval_metrics

Work = Callable[[], object]

SMALL = [16, 32, 64, 128]  # batches, as they come in a step of few pairs: there it is the number of calls that counts
ROUND = 0.02  # seconds: works that are done sooner are done several times in a round


class Comparison(NamedTuple):
    work: str
    peer: str
    package: str | None  # that must be there
    works: Callable[[], tuple[Work, Work]]  # the peer's and ours, made when it is their turn


def maxsim(images: Tensor, texts: Tensor, text_mask: Tensor) -> Tensor:
    """Late interaction as in ColBERT and PyLate: per word the maximum over the regions, summed: (N, N) of texts."""
    images, texts = F.normalize(images, dim=-1), F.normalize(texts, dim=-1)
    scores = torch.einsum("ash,bth->abst", texts, images).max(dim=-1).values  # [texts, images, words]
    return (scores * text_mask.unsqueeze(1)).sum(dim=-1)


def with_gradients(images: Tensor, texts: Tensor, score: Callable[[Tensor, Tensor], tuple[Tensor, ...]]) -> Work:
    def run() -> None:
        leaves = images.clone().requires_grad_(), texts.clone().requires_grad_()
        sum(x.sum() for x in score(*leaves)).backward()

    return run


def alignments(batch: Batch) -> Iterator[Comparison]:
    images, texts, mask = batch.image_fragments, batch.text_fragments, batch.text_mask
    lengths = mask.sum(dim=1).tolist()

    def ours(mode: str) -> Work:
        return lambda: align_fragments(images, texts, None, mask, mode=mode)

    size = f"N = {len(images)}, D = {images.shape[2]}"
    yield Comparison(
        f"alignment in the release's form, {size}", "a loop over captions (the release's way)", None,
        lambda: (lambda: per_caption(images, texts, lengths, mode="scan"), ours("scan")),
    )  # fmt: skip
    yield Comparison(
        f"alignment, {size}", "all pairs at once, masked", None,
        lambda: (lambda: dense(images, texts, mask), ours("cosine")),
    )  # fmt: skip
    yield Comparison(
        f"MaxSim, {size}", "PyLate's way in PyTorch", None,
        lambda: (lambda: maxsim(images, texts, mask), ours("cosine")),
    )  # fmt: skip
    yield Comparison(
        f"MaxSim with gradients, {size}", "PyLate's way in PyTorch", None,
        lambda: (
            with_gradients(images, texts, lambda r, c: (maxsim(r, c, mask),)),
            with_gradients(images, texts, lambda r, c: (align_fragments(r, c, None, mask).mean_t2i,)),
        ),
    )  # fmt: skip


def ragged_alignments(n: int, dim: int) -> Iterator[Comparison]:
    """Images have 20 to 36 regions each, as after VSE-infinity's size augmentation."""
    batch = make_batch(**{**RELEASE, "n": n, "dim": dim})
    images, texts, text_mask = batch.image_fragments, batch.text_fragments, batch.text_mask
    most = images.shape[1]
    lengths = torch.randint(20, most + 1, (n, 1), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(most) < lengths

    def theirs(r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return dense(r, c, text_mask, image_mask=mask)

    def ours(r: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        return align_fragments(r, c, mask, text_mask)

    work, peer = f"alignment, images with a mask{{}}, N = {n}, D = {dim}", "all pairs at once, masked"
    yield Comparison(
        work.format(""), peer, None, lambda: (lambda: theirs(images, texts), lambda: ours(images, texts)),
    )  # fmt: skip
    yield Comparison(
        work.format(", with gradients"), peer, None,
        lambda: (with_gradients(images, texts, theirs), with_gradients(images, texts, ours)),
    )  # fmt: skip


def losses(n: int, dim: int) -> Iterator[Comparison]:
    needed = ("pytorch_metric_learning", "pytorch_metric_learning", "open_clip", "open_clip")
    works = {}
    if all(map(importlib.util.find_spec, needed)):
        works = pair_losses.pairs_of_works(n, dim)
    names = ("TripletLoss, distance-weighted", "TripletLoss, hardest", "InfoNCELoss", "SigmoidLoss")
    peers = works or ("pytorch-metric-learning", "pytorch-metric-learning", "open_clip", "open_clip")
    for name, peer, package in zip(names, peers, needed, strict=True):
        yield Comparison(f"{name}, N = {n}", peer, package, lambda peer=peer: works[peer])


def retrieval(images: int, dim: int) -> Iterator[Comparison]:
    x, y = retrieval_speed.make_pairs(images, dim)

    def ours() -> object:
        return retrieval_metrics(x, y, captions_per_image=retrieval_speed.CAPTIONS)

    size = f"{images:,} × {len(y):,}, D = {dim}"
    for peer, work in (
        ("sorting every row (the release's way)", retrieval_speed.by_sorting),
        ("counting in float32, not exact", retrieval_speed.by_counting),
    ):
        yield Comparison(f"retrieval figures, {size}", peer, None, lambda work=work: (lambda: work(x, y), ours))


def sampling(images: int, clusters: int) -> Iterator[Comparison]:
    labels = torch.randint(clusters, (images,), generator=torch.Generator().manual_seed(0))

    def works() -> tuple[Work, Work]:
        from pytorch_metric_learning.samplers import MPerClassSampler

        theirs = MPerClassSampler(labels, m=16, batch_size=128, length_before_new_iter=images)
        ours = NeighborBatchSampler(cluster_ids=labels.numpy(), clusters_per_batch=8, images_per_cluster=16)
        return (lambda: list(theirs)), (lambda: list(ours))

    yield Comparison(f"sampler, an epoch of {images:,}", "MPerClassSampler", "pytorch_metric_learning", works)


def several(work: Work, times: int) -> Work:
    def run() -> None:
        for _ in range(times):
            work()

    return run


def measured(comparison: Comparison, repeats: int) -> list[str]:
    if comparison.package is not None and importlib.util.find_spec(comparison.package) is None:
        return [comparison.work, comparison.peer, f"{comparison.package} is missing", "", "", ""]
    works = dict(zip(("theirs", "ours"), comparison.works(), strict=True))
    once = seconds_in_turn(works, 1, "cpu")
    times = max(1, round(ROUND / max(1e-6, *(values[0] for values in once.values()))))
    works = {name: several(work, times) for name, work in works.items()}
    seconds = seconds_in_turn(works, repeats if times == 1 else 3 * repeats, "cpu", warm_up=times > 1)
    ratios = sorted(x / y for x, y in zip(seconds["ours"], seconds["theirs"], strict=True))
    best = {name: min(values) / times for name, values in seconds.items()}
    digits = 1 if times == 1 else 2
    return [
        comparison.work, comparison.peer, *(f"{best[name] * 1e3:.{digits}f}" for name in works),
        f"{best['ours'] / best['theirs']:.2f}",
        f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
    ]  # fmt: skip


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.set_defaults(threads=1, clock="cpu", repeats=5)
    parser.add_argument("--quick", action="store_true", help="small sizes and three rounds")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quick, repeats = arguments.quick, 3 if arguments.quick else arguments.repeats
    batch = make_batch(**{**RELEASE, **({"n": 32, "dim": 256} if quick else {})})
    few = [8] if quick else [8, 32]
    comparisons = [
        *alignments(batch),
        *(each for n in few for each in alignments(make_batch(**{**RELEASE, "n": n, "dim": 256}))),
        *(each for n in ([16] if quick else [16, 32, 64, 128]) for each in ragged_alignments(n, 256)),
        *(each for n in ([16, 256] if quick else [*SMALL, 512, 1024, 2048, 4096]) for each in losses(n, 256)),
        *(each for n in ([50] if quick else [50, 200]) for each in retrieval(n, 256)),
        *retrieval(*((100, 256) if quick else (1000, 1024))),
        *(each for size in ([(500, 10)] if quick else [(500, 10), (29_000, 453)]) for each in sampling(*size)),
    ]
    rows = []
    with threadpool_limits(limits=1):
        for comparison in comparisons:
            rows.append(measured(comparison, repeats))
        paragraphs = [
            "CPU time, ours / the other's, in turn; the range is that of single rounds.",
            table(["work", "other", "other, best ms", "ours, best ms", "ratio of best", "median ratio (range)"], rows),
        ]
        if importlib.util.find_spec("faiss") is None:
            paragraphs.append("k-means: faiss is missing.")
        else:
            paragraphs += clustering.paragraphs(0.05 if quick else 1.0, repeats=1 if quick else 3)
    section("Beside other libraries", *paragraphs)


if __name__ == "__main__":
    main()
