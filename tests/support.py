"""What several test files use: random batches, padding put elsewhere, comparison, recorded data."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GOLDEN = Path(__file__).parent / "golden"
SIZES = ("small", "odd")


def golden(size: str, name: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """One recorded file; what is floating point in ``dtype``."""
    with np.load(GOLDEN / size / f"{name}.npz") as file:
        tensors = {key: torch.from_numpy(file[key]) for key in file}
    return {key: x.to(dtype) if x.dtype.is_floating_point else x for key, x in tensors.items()}


def assert_near(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Finite, the same shape, and no element off by more than ``tolerance`` times the largest expected one."""
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    actual, expected = actual.detach().double(), expected.detach().double()
    scale = expected.abs().max().item() if expected.numel() else 0.0
    error = (actual - expected).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale + 1e-300, f"{what}: off by {error:.3g} where the largest is {scale:.3g}"


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_mask(n: int, width: int, seed: int, *, at_least: int = 1) -> Tensor:
    """(n, width) bool, True in any places, at least so many per row; the rows differ in number."""
    g = generator(seed)
    counts = torch.randint(at_least, width + 1, (n, 1), generator=g)
    places = torch.rand(n, width, generator=g).argsort(dim=1)
    return torch.zeros(n, width, dtype=torch.bool).scatter_(1, places, torch.arange(width) < counts)


def batch(
    n: int = 6, r: int = 5, w: int = 7, *, dim: int = 16, seed: int = 0, dtype: torch.dtype = torch.float32,
    grad: bool = True,
) -> dict[str, Tensor]:  # fmt: skip
    """The arguments of HREMLoss by name, padded here and there; every item has two real fragments, if it can.

    (In scan mode an item with one real fragment has p = ±1 with all others: which of them are its neighbors is
    then decided by rounding.)
    """
    g = generator(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_(grad)

    return {
        "image_embedding": rand(n, dim),
        "text_embedding": rand(n, dim),
        "image_fragments": rand(n, r, dim),
        "text_fragments": rand(n, w, dim),
        "image_mask": random_mask(n, r, seed + 1, at_least=min(2, r)),
        "text_mask": random_mask(n, w, seed + 2, at_least=min(2, w)),
        "image_ids": torch.arange(n) // 2 * 2 if n > 2 else torch.arange(n),
    }


GRAPH_INPUTS = (
    "image_embedding", "text_embedding", "image_fragments", "text_fragments", "image_mask", "text_mask",
)  # fmt: skip


def graph_inputs(**options) -> dict[str, Tensor]:
    b = batch(**options)
    return {name: b[name] for name in GRAPH_INPUTS}


def repad(fragments: Tensor, mask: Tensor, *, fill: float | None, extra: int, seed: int) -> tuple:
    """The same real fragments in a wider tensor, at other places in the same order, with other padding.

    Returns the new leaf, its mask, and ``back``: picks the old places out of a tensor like the new leaf.
    ``fill`` stands in every padded place; None = random numbers.
    """
    n, r, d = fragments.shape
    g = generator(seed)
    places = torch.rand(n, r + extra, generator=g).argsort(dim=1)[:, :r].sort(dim=1).values  # [n, r]
    new_mask = torch.zeros(n, r + extra, dtype=torch.bool).scatter_(1, places, mask)
    new = torch.randn(n, r + extra, d, generator=g).to(fragments.dtype) * 7
    if fill is not None:
        new.fill_(fill)
    index = places.unsqueeze(-1).expand(n, r, d)
    old = torch.where(mask.unsqueeze(-1), fragments.detach(), new.gather(1, index))
    new = new.scatter(1, index, old).requires_grad_(fragments.requires_grad)
    return new, new_mask, lambda x: x.gather(1, index)


def weigh(*outputs: Tensor) -> Tensor:
    """A scalar that depends on every element of every output, each in its own way."""
    total = torch.zeros((), dtype=torch.float64)
    for x in outputs:
        if x.dtype.is_floating_point:
            total = total + (x.double() * torch.randn(x.shape, generator=generator(x.numel())).double()).sum()
    return total


def gradients(inputs: dict[str, Tensor], *outputs: Tensor) -> dict[str, Tensor]:
    """d weigh(outputs) / d input, by name, of all inputs that require it; zeros where unused."""
    leaves = {name: x for name, x in inputs.items() if isinstance(x, Tensor) and x.requires_grad}
    grads = torch.autograd.grad(weigh(*outputs), list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, grads, strict=True))


def benchmark(name: str) -> ModuleType:
    """A file of benchmarks/ that needs no other of them."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent.parent / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tensors_peak_mb(work: Callable[[], object]) -> float:
    """Peak of the bytes of tensors that ``work`` made and that are alive, in MB."""
    return benchmark("_common").tensors_peak_mb(work)


class LargestTensor(TorchDispatchMode):
    """``with LargestTensor() as seen: ...``: ``seen.elements`` of the largest tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple) else (out,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return out
