"""Work that is done again in the backward pass rather than kept for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def saved_tensors_are_fixed() -> bool:
    """In torch.func, whose transforms refuse hooks on what is saved."""
    return bool(torch._C._autograd._saved_tensors_hooks_get_disabled_error_message())


def compute_twice(work: Callable[..., Tensor], *arguments: Tensor | tuple[Tensor, ...]) -> Tensor:
    """``work(*arguments)``, of which only the arguments stay for the backward pass, also where it is traced."""
    out: Tensor = checkpoint(work, *arguments, use_reentrant=False, preserve_rng_state=False)
    return out


def recompute(work: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``work(x)``, of which nothing but ``x`` stays for the backward pass. ``work`` draws no random numbers and does
    not communicate on its way forward: the processes would not come to it in the same order.

    Traced, a compiler decides by itself what to keep.
    """
    keeps = (
        torch.compiler.is_compiling() or not (torch.is_grad_enabled() and x.requires_grad) or saved_tensors_are_fixed()
    )
    return work(x) if keeps else compute_twice(work, x)
