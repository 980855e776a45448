"""How far are values and gradients in each dtype from the formulas in float64, on the same rounded inputs?

Under autocast as well, where similarities are rounded to bfloat16 before their maxima are taken.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import torch
from _common import make_batch, section, table
from torch import Tensor

from hrem_layers import align_fragments
from hrem_layers.alignment.reference import align_by_loops
from hrem_layers.alignment.scores import MODES

SIZE = {"n": 6, "regions": 36, "shortest": 8, "longest": 24, "dim": 256}
# name: dtype of images, of texts, autocast's dtype
CASES = {
    "float64": (torch.float64, torch.float64, None),
    "float32": (torch.float32, torch.float32, None),
    "float16": (torch.float16, torch.float16, None),
    "bfloat16": (torch.bfloat16, torch.bfloat16, None),
    "bfloat16 with float32": (torch.bfloat16, torch.float32, None),
    "float32, autocast to bfloat16": (torch.float32, torch.float32, torch.bfloat16),
}


def weighted(scores: tuple[Tensor, ...]) -> Tensor:
    """A sum in which every score has a weight of its own."""
    g = torch.Generator().manual_seed(1)
    return sum((x * torch.randn(x.shape, generator=g).to(x.dtype)).sum() for x in scores)


def relative(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def errors(case: tuple[torch.dtype, torch.dtype, torch.dtype | None], mode: str, seed: int) -> tuple[float, float]:
    """Of values and of gradients: ‖error‖ / ‖exact‖, the largest over the scores or the two gradients."""
    image_dtype, text_dtype, cast = case
    batch = make_batch(**SIZE, seed=seed)
    leaves = [batch.image_fragments.to(image_dtype), batch.text_fragments.to(text_dtype)]
    exact = [x.double().requires_grad_() for x in leaves]
    leaves = [x.requires_grad_() for x in leaves]
    with torch.autocast("cpu", dtype=cast) if cast else nullcontext():
        ours = align_fragments(*leaves, None, batch.text_mask, mode=mode)
    loops = align_by_loops(*exact, None, batch.text_mask, mode=mode)
    ours_grad, loops_grad = (torch.autograd.grad(weighted(x), y) for x, y in ((ours, leaves), (loops, exact)))
    values = max(relative(x.detach(), y.detach()) for x, y in zip(ours, loops, strict=True))
    return values, max(relative(x, y) for x, y in zip(ours_grad, loops_grad, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="batches; the largest error counts")
    arguments = parser.parse_args()
    rows = []
    for mode in MODES:
        for name, case in CASES.items():
            found = [errors(case, mode, seed) for seed in range(arguments.seeds)]
            rows.append([mode, name, *(f"{max(x):.1e}" for x in zip(*found, strict=True))])
    section(
        "Errors per dtype",
        f"`align_fragments` against the formulas as loops in float64 on the same rounded fragments: ‖error‖ / ‖exact‖, "
        f"the largest of {arguments.seeds} batches of {SIZE['n']} pairs of noise, D = {SIZE['dim']}. A half type's "
        "gradient is rounded to it when it goes out (2⁻¹¹ and 2⁻⁸ of each number at most); the similarities are not, "
        "except under autocast: there values that are 0.4% apart tie and share a gradient that belongs to one of "
        "them. In float32 two of the many values of such a batch are within 10⁻⁶ of one another now and then, and "
        "share as well.",
        table(["mode", "fragments", "values", "gradients"], rows),
    )


if __name__ == "__main__":
    main()
