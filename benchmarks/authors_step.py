"""A training step after the encoders: the authors' own code beside HREMLoss, in time and peak memory.

The authors' code is not a part of this repository:

    git clone https://github.com/CrossmodalGroup/HREM runs/HREM
    python benchmarks/authors_step.py                   # or --authors PATH
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from _common import (
    RELEASE,
    extra_peak_mb,
    in_own_process,
    make_batch,
    options,
    ratio_table,
    section,
    table,
    time_in_turn,
)

from hrem_layers import HREMLoss
from hrem_layers.tools import release

CHECKOUT = Path(__file__).parent.parent / "runs" / "HREM"
NAMES = {
    "authors": "the authors' code",
    "settings": "HREMLoss, the authors' settings",
    "default": "HREMLoss, default",
}


def authors_loss(path: Path) -> torch.nn.Module:
    """Their loss with the options that they train with on Flickr30K, from the first step on."""
    sys.path.insert(0, str(path))
    torch.Tensor.cuda = lambda self, *_, **__: self  # they ask for a GPU
    import graph_lib

    opt = graph_lib.extra_parameters(argparse.ArgumentParser()).parse_args([])
    opt.dataset, opt.embed_size, opt.mask_repeat, opt.margin, opt.max_violation = "f30k", RELEASE["dim"], 1, 0.2, False
    opt.warmup = 0
    return graph_lib.GraphLoss(opt)


def make(who: str, path: Path) -> tuple[torch.nn.Module, Callable[[int], Callable[[], None]]]:
    """The loss, and for a batch of n a step of it: forward and backward, fragments detached."""
    torch.manual_seed(0)
    if who == "authors":
        loss = authors_loss(path)
    else:
        loss = release.loss(RELEASE["dim"], warmup_steps=0) if who == "settings" else HREMLoss(RELEASE["dim"])

    def of_size(n: int) -> Callable[[], None]:
        batch = make_batch(**{**RELEASE, "n": n})
        v, u = batch.image_embedding.requires_grad_(), batch.text_embedding.requires_grad_()
        ids, lengths = torch.arange(n), batch.text_mask.sum(dim=1)
        regions = torch.full((n,), RELEASE["regions"])

        def step() -> None:
            if who == "authors":
                images = None, regions, F.normalize(v, dim=-1), v, batch.image_fragments
                texts = None, lengths, F.normalize(u, dim=-1), u, batch.text_fragments
                loss(images, texts, ids).backward()
            else:
                loss(v, u, batch.image_fragments, batch.text_fragments, None, batch.text_mask, image_ids=ids).backward()

        return step

    return loss, of_size


def peak(who: str, path: Path, held: bool) -> float:
    torch.set_num_threads(2)
    loss, of_size = make(who, path)
    of_size(16)()
    loss.zero_grad(set_to_none=not held)
    return extra_peak_mb(of_size(RELEASE["n"]))


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--authors", type=Path, default=CHECKOUT, metavar="PATH", help="a checkout of their code")
    parser.add_argument("--peak", nargs=2, metavar=("WHO", "GRADIENTS"), help="measure memory in this process")
    arguments = parser.parse_args()
    if not (arguments.authors / "graph_lib.py").is_file():
        clone = "git clone https://github.com/CrossmodalGroup/HREM runs/HREM"
        parser.error(f"no code of the authors at {arguments.authors}: {clone}")
    if arguments.peak:
        print(peak(arguments.peak[0], arguments.authors, arguments.peak[1] == "held"))
        return
    torch.set_num_threads(arguments.threads)
    steps = {NAMES[who]: make(who, arguments.authors)[1](RELEASE["n"]) for who in ("authors", "settings", "default")}
    timings = time_in_turn(steps, arguments.repeats, arguments.clock)
    rows = []
    for who, name in NAMES.items():
        cells = []
        for held in ("held", "new"):
            found = sorted(
                float(in_own_process(__file__, "--authors", str(arguments.authors), "--peak", who, held))
                for _ in range(5)
            )
            cells.append(f"{found[2]:.0f} ({found[0]:.0f} to {found[-1]:.0f})")
        rows.append([name, *cells])
    section(
        "A step of the authors' code",
        "Their `GraphLoss` and HREMLoss after the encoders at the release's size (128 images of 36 regions, 128 "
        "captions of 8 to 24 words, D = 1024, float32), forward and backward with detached fragments. Time:",
        ratio_table(timings, NAMES["authors"]),
        "What the process holds at its peak beyond what it held before, in MB, median and range of five processes; the "
        "gradients of the parameters were there before the step, or are made by it:",
        table(["", "gradients there before", "gradients made"], rows),
    )


if __name__ == "__main__":
    main()
