"""CPU time of exact retrieval figures against counting in float32 and against sorting every row, as is usual.

    python benchmarks/retrieval_speed.py                                # 200 x 1K and 1K x 5K, D = 1024
    python benchmarks/retrieval_speed.py --large                        # and a slice of 100K x 500K, D = 256
    python benchmarks/retrieval_speed.py --large --large-images 100000  # all of it: some minutes

*Sorting* is how the field's evaluation scripts do it: similarities in float32, a sort of every row and every column,
a search for the matches in it. *Counting in float32* compares with the best match instead. Neither is exact. The
positions of ours are compared with those of a float64 product.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from _common import Timing, options, ratio_table, section, status_kib, table, time_in_turn
from torch import Tensor

from hrem_layers.retrieval import retrieval_metrics
from hrem_layers.retrieval.positions import items_ahead
from hrem_layers.retrieval.similarity import Cosines

CAPTIONS = 5


def make_pairs(images: int, dim: int) -> tuple[Tensor, Tensor]:
    """Images and five captions of each, that find one another about as often as those of a trained model do."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(images, dim, generator=g)
    y = x.repeat_interleave(CAPTIONS, dim=0)
    return x, y.add_(torch.randn(y.shape, generator=g), alpha=0.22 * dim**0.5)


def by_sorting(images: Tensor, texts: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Zero-based position of the best match of each image and of each text."""
    similarity = (F.normalize(images) @ F.normalize(texts).t()).numpy()
    image_position = np.zeros(len(images), np.int64)
    for i, row in enumerate(similarity):
        order = np.argsort(row)[::-1]
        image_position[i] = min(np.where(order == text)[0][0] for text in range(CAPTIONS * i, CAPTIONS * (i + 1)))
    text_position = np.zeros(len(texts), np.int64)
    for j, column in enumerate(similarity.T):
        text_position[j] = np.where(np.argsort(column)[::-1] == j // CAPTIONS)[0][0]
    return image_position, text_position


def by_counting(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return count_ahead(F.normalize(images) @ F.normalize(texts).t())


def in_float64(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    return count_ahead(F.normalize(images.double()) @ F.normalize(texts.double()).t())


def count_ahead(similarity: Tensor) -> tuple[Tensor, Tensor]:
    n, m = similarity.shape
    own = similarity.view(n, n, CAPTIONS)[torch.arange(n), torch.arange(n)]  # [n, 5]
    return (similarity > own.amax(dim=1, keepdim=True)).sum(dim=1), (similarity > own.reshape(1, m)).sum(dim=0)


def exactly(images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    ids = torch.arange(len(images))
    similarity = Cosines.of(images, texts)
    return items_ahead(similarity, ids, ids.repeat_interleave(CAPTIONS), "pessimistic", None)


def against_the_usual(images: int, dim: int, repeats: int, clock: str = "cpu") -> tuple[dict[str, Timing], int]:
    """Timings, and at how many queries our positions differ from those in float64."""
    x, y = make_pairs(images, dim)
    variants: dict[str, Callable[[], object]] = {
        "sorting": lambda: by_sorting(x, y),
        "counting in float32": lambda: by_counting(x, y),
        "retrieval_metrics": lambda: retrieval_metrics(x, y, captions_per_image=CAPTIONS),
    }
    timings = time_in_turn(variants, repeats, clock)
    different = sum(int((a != b).sum()) for a, b in zip(exactly(x, y), in_float64(x, y), strict=True))
    return timings, different


def progress_line(start: float) -> Callable[[int, int], None]:
    """Writes how far it is, at most twice a second, to standard error."""
    last = start

    def tell(done: int, total: int) -> None:
        nonlocal last
        now = time.perf_counter()
        if now - last > 0.5 or done == total:
            last = now
            end = "\n" if done == total else ""
            print(
                f"\r{done / total:6.1%} of {total:.1e} pairs, {now - start:.0f} s", end=end, file=sys.stderr, flush=True
            )

    return tell


def large(images: int, asked: int, dim: int) -> tuple[float, int]:
    """CPU seconds of asking the first of ``images`` images, and the peak memory beyond the embeddings in bytes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(asked, dim, generator=g)
    texts = torch.randn(images * CAPTIONS, dim, generator=g)
    texts[: asked * CAPTIONS].add_(x.repeat_interleave(CAPTIONS, dim=0), alpha=0.6)
    ids = torch.arange(images).repeat_interleave(CAPTIONS)
    before = status_kib("VmRSS")
    start = time.process_time()
    retrieval_metrics(
        x, texts, image_ids=torch.arange(asked), text_ids=ids, unmatched="distractor" if asked < images else "error",
        progress=progress_line(time.perf_counter()),
    )  # fmt: skip
    return time.process_time() - start, (status_kib("VmHWM") - before) * 1024


def large_paragraphs(images: int, asked: int, dim: int) -> list[str]:
    sizes = [asked] if asked >= images else [asked // 2, asked]
    found = [large(images, size, dim) for size in sizes]
    rows = [
        [f"{size:,} × {images * CAPTIONS:,}", f"{seconds:.0f}", f"{peak / 1e6:.0f}"]
        for size, (seconds, peak) in zip(sizes, found, strict=True)
    ]
    text = [
        f"{images:,} images with {images * CAPTIONS:,} captions at D = {dim}, of which some or all images are asked; "
        "peak memory beyond the embeddings:",
        table(["images × captions", "CPU s", "MB"], rows),
    ]
    if len(sizes) > 1:
        (x, y), ((fast, _), (slow, _)) = sizes, found
        text.append(
            f"Extrapolated to all images, in a straight line: {fast + (slow - fast) / (y - x) * (images - x):.0f} s."
        )
    return text


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.set_defaults(threads=1, clock="cpu", repeats=5)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 1000], help="with five captions each")
    parser.add_argument("--dim", type=int, default=1024, help="D")
    parser.add_argument("--large", action="store_true", help="100K x 500K at D = 256 as well, or a slice of it")
    parser.add_argument("--large-images", type=int, default=5000, help="of the 100,000: those that are asked")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    paragraphs = []
    if arguments.large:  # first: the peak of memory is that of the process
        paragraphs = large_paragraphs(100_000, arguments.large_images, 256)
    small = []
    for n in arguments.images:
        timings, different = against_the_usual(n, arguments.dim, arguments.repeats, arguments.clock)
        small += [
            f"{n:,} images with {CAPTIONS} captions each, D = {arguments.dim}:",
            ratio_table(timings, "counting in float32"),
            f"Against sorting: {timings['retrieval_metrics'].best / timings['sorting'].best:.2f}. Queries whose "
            f"position differs from that by a float64 product: {different} of {n * (1 + CAPTIONS):,}.",
        ]
    section(
        "Retrieval figures",
        "*Sorting* every row and column is the usual way; it and *counting in float32* are not exact.",
        *small,
        *paragraphs,
    )


if __name__ == "__main__":
    main()
