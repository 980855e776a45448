"""The pair losses beside those of other libraries, from embeddings to gradients, both directions each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from _common import options, ratio_table, section, time_in_turn
from torch import Tensor

from hrem_layers import InfoNCELoss, SigmoidLoss, TripletLoss

MARGIN, NONZERO_CUTOFF, TEMPERATURE = 0.2, 1.7, 0.07
SIGMOID_TEMPERATURE, SIGMOID_BIAS = 0.1, -10.0


def peers() -> tuple[ModuleType, ModuleType, ModuleType]:
    """pytorch-metric-learning's miners and losses, open_clip's loss.py."""
    for name, package in (("pytorch_metric_learning", "pytorch-metric-learning"), ("open_clip", "open-clip-torch")):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{package} is not installed: pip install 'hrem-layers[peers]'")
    from pytorch_metric_learning import losses, miners

    # the file by itself: the package imports torchvision, which the loss does not need
    where = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("open_clip_loss", f"{where}/loss.py")
    open_clip_loss = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(open_clip_loss)
    return miners, losses, open_clip_loss


Work = Callable[[], object]


def pairs_of_works(n: int, dim: int) -> dict[str, tuple[Work, Work]]:
    """Per peer its work and ours, forward and backward."""
    miners, metric_losses, open_clip_loss = peers()
    hinge, clip = metric_losses.TripletMarginLoss(margin=MARGIN), open_clip_loss.ClipLoss()
    siglip = open_clip_loss.SigLipLoss()
    siglip_numbers = torch.tensor(1 / SIGMOID_TEMPERATURE), torch.tensor(SIGMOID_BIAS)
    g = torch.Generator().manual_seed(0)
    x = F.normalize(torch.randn(n, dim, generator=g))
    y = F.normalize(x + 0.5 * F.normalize(torch.randn(n, dim, generator=g)))
    positives, labels = torch.eye(n, dtype=torch.bool), torch.arange(n)

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Work:
        def run() -> None:
            images, texts = x.clone().requires_grad_(), y.clone().requires_grad_()
            loss(images, texts).backward()

        return run

    def ours(loss: Callable[[Tensor, Tensor], Tensor]) -> Work:
        return step(lambda images, texts: loss(images @ texts.t(), positives))

    def mined(miner: Callable[..., tuple[Tensor, ...]]) -> Work:
        return step(
            lambda a, b: (
                hinge(a, labels, miner(a, labels, b, labels), b, labels)
                + hinge(b, labels, miner(b, labels, a, labels), a, labels)
            )
        )

    return {
        "pytorch-metric-learning, distance weighted": (
            mined(miners.DistanceWeightedMiner(nonzero_loss_cutoff=NONZERO_CUTOFF)),
            ours(TripletLoss(MARGIN, nonzero_cutoff=NONZERO_CUTOFF)),
        ),
        "pytorch-metric-learning, batch hard": (
            mined(miners.BatchHardMiner()), ours(TripletLoss(MARGIN, negative_sampling="hardest")),
        ),
        "open_clip ClipLoss": (
            step(lambda a, b: clip(a, b, torch.tensor(1 / TEMPERATURE))), ours(InfoNCELoss(TEMPERATURE)),
        ),
        "open_clip SigLipLoss": (
            step(lambda a, b: siglip(a, b, *siglip_numbers)),
            ours(SigmoidLoss(SIGMOID_TEMPERATURE, bias=SIGMOID_BIAS, learnable=False)),
        ),
    }  # fmt: skip


def main() -> None:
    parser = options(__doc__)
    parser.set_defaults(threads=1, clock="cpu", repeats=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="N")
    parser.add_argument("--dim", type=int, default=256, help="D")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = []
    for n in arguments.sizes:
        for name, (theirs, our) in pairs_of_works(n, arguments.dim).items():
            timings = time_in_turn({name: theirs, "hrem_layers": our}, arguments.repeats, arguments.clock)
            tables.append(f"N = {n}\n\n" + ratio_table(timings, name))
    section(
        "Pair losses beside those of other libraries",
        f"Forward and backward from embeddings of D = {arguments.dim}, images against texts and texts against images, "
        f"one positive per row.",
        *tables,
    )


if __name__ == "__main__":
    main()
