"""Runs the README's training loop on somebody's own two encoders: small ones, written here.

    python tests/readme_loop.py README.md

Also run outside the checkout, against an installed wheel.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch
from torch import Tensor, nn


class Encoder(nn.Module):
    """Mean-pooled fragments: the plainest encoder that returns both."""

    def __init__(self, fragments: nn.Module) -> None:
        super().__init__()
        self.fragments = fragments

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        fragments = self.fragments(x)
        real = mask.unsqueeze(-1)
        return (fragments * real).sum(1) / real.sum(1), fragments


def python_blocks(readme: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", readme.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(readme: Path) -> list[float]:
    """The totals of a few steps of the README's loop, on one batch that repeats."""
    torch.manual_seed(0)
    n, regions, words = 32, 5, 7
    batch = (
        torch.randn(n, regions, 12),
        torch.rand(n, regions) < 0.8,
        torch.randint(50, (n, words)),
        torch.arange(words) < torch.randint(1, words + 1, (n, 1)),
        torch.arange(n) // 2,
    )
    batch[1][:, 0] = True
    totals: list[float] = []
    (block,) = python_blocks(readme)
    names = {
        "image_encoder": Encoder(nn.Linear(12, 256)),
        "text_encoder": Encoder(nn.Embedding(50, 256)),
        "loader": [batch] * 12,
    }
    exec(block.replace("total.backward()", "total.backward(); totals.append(total.item())"), names | {"totals": totals})
    return totals


if __name__ == "__main__":
    import hrem_layers

    losses = run(Path(sys.argv[1]))
    print(f"{hrem_layers.__file__}: {losses[0]:.2f} -> {losses[-1]:.2f} in {len(losses)} steps")
    if not losses[-1] < 0.9 * losses[0]:
        sys.exit("the README's loop does not learn")
