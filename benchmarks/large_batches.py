"""Large batches on small memory: pair losses without their similarity, encoders in micro-batches."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _common import extra_peak_mb, in_own_process, section, table
from torch import nn

from hrem_layers import InfoNCELoss, SigmoidLoss, TripletLoss
from hrem_layers.tools.gradient_cache import gradient_cached_backward

DIM = 256
LOSSES = {
    "InfoNCELoss": InfoNCELoss(),
    "SigmoidLoss": SigmoidLoss(),
    "TripletLoss, hardest": TripletLoss(negative_sampling="hardest"),
    "TripletLoss, distance_weighted": TripletLoss(),
}
SIZES = (1024, 4096, 16384)
LARGEST_WHOLE = 4096
ITEMS, REGIONS, WIDTH, LAYERS = 256, 36, 256, 4
MICRO_BATCHES = (256, 64, 16)


def pair_loss_step(name: str, form: str, n: int) -> Callable[[], object]:
    """Forward and backward from embeddings; texts lie near their images."""
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, DIM, generator=g)).requires_grad_()
    y = F.normalize(x.detach() + 0.5 * F.normalize(torch.randn(n, DIM, generator=g))).requires_grad_()
    loss = LOSSES[name]
    if form == "streamed":
        return lambda: loss.from_embeddings(x, y, normalize=False).backward()
    return lambda: loss(x @ y.t(), torch.eye(n, dtype=torch.bool)).backward()


def encoder_step(micro_batch: int) -> Callable[[int], Callable[[], object]]:
    """An image encoder of transformer layers and a text encoder that is a table; 0 = one pass."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 8, 4 * WIDTH, dropout=0.1, batch_first=True)
    images, texts = nn.TransformerEncoder(layer, LAYERS), nn.Embedding(1000, WIDTH)
    loss = InfoNCELoss().from_embeddings
    encoders = [lambda x: images(x).mean(dim=1), texts]

    def work(n: int) -> Callable[[], object]:
        inputs = [(torch.randn(n, REGIONS, WIDTH),), (torch.randint(1000, (n,)),)]
        if not micro_batch:
            return lambda: loss(*(encode(*x) for encode, x in zip(encoders, inputs, strict=True))).backward()
        return lambda: gradient_cached_backward(loss, encoders, inputs, micro_batch_size=micro_batch)

    return work


def measure(what: str, how: str, n: int) -> tuple[float, float]:
    """Extra peak MB of a step, and its CPU seconds on one thread: the better of two."""
    torch.set_num_threads(1)
    make = encoder_step(int(how)) if what == "encoders" else lambda n: pair_loss_step(what, how, n)
    make(16)()
    run = make(n)
    seconds = []
    start = time.process_time()
    peak = extra_peak_mb(run)
    seconds.append(time.process_time() - start)
    if n <= LARGEST_WHOLE:
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return peak, min(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "HOW", "N"), help="measure one point in this process")
    parser.add_argument("--largest", type=int, default=SIZES[-1], help="leave out larger N of the pair losses")
    arguments = parser.parse_args()
    if arguments.one:
        what, how, n = arguments.one
        print(json.dumps(measure(what, how, int(n))))
        return

    def point(*which: str) -> tuple[float, float]:
        return tuple(json.loads(in_own_process(__file__, "--one", *which)))

    torch.set_num_threads(1)
    rows = []
    for name in LOSSES:
        for n in (n for n in SIZES if n <= arguments.largest):
            peak, seconds = point(name, "streamed", str(n))
            whole = point(name, "whole", str(n)) if n <= LARGEST_WHOLE else None
            rows.append([
                name, str(n), "not run" if whole is None else f"{whole[0]:.0f}", f"{peak:.0f}",
                f"{n * DIM * 4 * 2 / 1e6:.0f}", "not run" if whole is None else f"{whole[1]:.2f}", f"{seconds:.2f}",
            ])  # fmt: skip
    section(
        "Pair losses",
        f"Forward and backward from N images and N texts, D = {DIM}, float32, one thread: what the process holds at "
        "its peak beyond what it held before, and CPU time, each in a process of its own. *Gradients* are those of the "
        "embeddings, part of both.",
        table(["", "N", "whole, MB", "streamed, MB", "gradients, MB", "whole, CPU s", "streamed, CPU s"], rows),
    )
    rows = []
    for micro_batch in (0, *MICRO_BATCHES):
        peak, seconds = point("encoders", str(micro_batch), str(ITEMS))
        rows.append([str(micro_batch) if micro_batch else "one pass", f"{peak:.0f}", f"{seconds:.2f}"])
    section(
        "Encoders in micro-batches",
        f"{ITEMS} images of {REGIONS} regions through {LAYERS} transformer layers of width {WIDTH}, float32, one "
        "thread.",
        table(["micro-batch", "peak, MB", "CPU s"], rows),
    )


if __name__ == "__main__":
    main()
