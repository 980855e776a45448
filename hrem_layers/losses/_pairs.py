"""What the pair losses check and share."""

from __future__ import annotations

import torch
from torch import Tensor

from hrem_layers._core.checks import check_number, check_tensor, describe, said
from hrem_layers._core.numerics import compute_dtype

REDUCTIONS = ("sum", "mean")


def check_pairs(similarity: Tensor, positives: Tensor) -> Tensor:
    """Checks both arguments; returns the similarity in float32 or better."""
    check_tensor("similarity", similarity, ("N", "M"))
    check_pair_flags("positives", positives, similarity, "the pair belongs together")
    if 0 in similarity.shape:
        raise ValueError(f"similarity must hold at least 1 pair, got shape {tuple(similarity.shape)}")
    return similarity.to(compute_dtype(similarity.dtype))


def check_pair_flags(name: str, flags: object, similarity: Tensor, meaning: str) -> None:
    """A dense bool tensor of the shape and on the device of ``similarity``."""
    shape = tuple(similarity.shape)
    if not isinstance(flags, Tensor):
        raise TypeError(f"{name} must be a bool tensor of shape {shape}, True = {meaning}, got {said(flags)}")
    if flags.is_nested or flags.layout != torch.strided or flags.dtype != torch.bool:
        raise TypeError(f"{name} must be a dense bool tensor, True = {meaning}, got {describe(flags)}")
    if flags.shape != similarity.shape:
        raise ValueError(f"{name} must have shape {shape} like similarity, got {describe(flags)}")
    if flags.device != similarity.device:
        raise ValueError(f"{name} must be on {similarity.device} like similarity, got {describe(flags)}")


def check_constant(name: str, value: float, **bounds: float) -> float:
    """A number in its range; not looked at in a traced graph, where it may be a symbol."""
    if torch.compiler.is_compiling():
        return value
    number = check_number(name, value, **bounds)
    if abs(number) > torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be a number that float32 can hold, got {said(value)}")
    return number


def as_bytes(flags: Tensor) -> Tensor:
    """The same memory as 0 and 1: on a CPU that is turned into floats, and reduced, ten times as fast as bool is."""
    return flags.view(torch.uint8)


def one_if_finite(*tensors: Tensor) -> Tensor:
    """A scalar, 1, or NaN if any element is NaN or infinite; no value is waited for.

    A factor of every loss, because a choice among elements hides what it does not choose. As a factor and not a
    summand it also reaches the gradient, which is what a gradient scaler looks at.
    """
    return if_finite(1, *tensors)


def if_finite(value: float, *tensors: Tensor) -> Tensor:
    """As :func:`one_if_finite`, times ``value``: a constant factor costs nothing then."""
    like = tensors[0]
    factor, zero = like.new_full((), value), like.new_zeros(())  # tensors: a number would be made one every time
    for x in tensors:
        for extreme in torch.aminmax(x.detach()) if x.dim() else (x.detach(),):
            factor = torch.addcmul(factor, extreme, zero)
    return factor.to(like.dtype)
