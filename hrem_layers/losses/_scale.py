"""The temperature of a pair loss: a number, a parameter of the loss, or a parameter that belongs to a model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrem_layers._core.checks import check_number, check_tensor, said
from hrem_layers.losses._pairs import one_if_finite


def as_number(value: object) -> object:
    """The value of a tensor of one element, anything else as it came."""
    if isinstance(value, Tensor) and not value.is_nested and value.numel() == 1 and value.device.type != "meta":
        return value.detach().item()
    return value


def log_of_inverse(temperature: float, max_scale: float) -> float:
    """log(1/τ), at most log(max_scale)."""
    return min(-math.log(temperature), math.log(max_scale))


def check_shared(name: str, parameter: object) -> nn.Parameter:
    """A parameter of one element that another module owns."""
    if not isinstance(parameter, nn.Parameter):
        raise TypeError(f"{name} must be a torch.nn.Parameter of one element, got {said(parameter)}")
    check_tensor(name, parameter, ("1",) if parameter.dim() else ())
    if parameter.numel() != 1:
        raise ValueError(f"{name} must have one element, got shape {tuple(parameter.shape)}")
    return parameter


def share(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Makes ``parameter`` an attribute without registering it.

    Its owner's ``parameters()`` and ``state_dict()`` hold it. Held by both, it would be stepped twice by an optimizer
    that is given both, and averaged twice by two DDP wrappers.
    """
    object.__setattr__(module, name, parameter)


def check_temperature(temperature: object, *, max_scale: float = math.inf) -> float:
    """τ > 0; with a limit on 1/τ, values beyond it by rounding (1%, as bfloat16 has) become the limit itself."""
    number = as_number(temperature)
    least = 1 / max_scale
    if least > 0 and isinstance(number, float) and 0.99 * least <= number < least:
        return least
    if least > 0:
        return check_number("temperature", number, minimum=least)
    return check_number("temperature", number, above=0)


def scale_of(log_scale: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """exp(log_scale) as a 0-dimensional tensor, computed in ``dtype``; NaN for a parameter that is not finite, which
    would else look like the limit, or like 0. It must be on ``device``, where the similarities are."""
    check_tensor("log_scale", log_scale, ("1",) if log_scale.dim() else (), device=device)
    return log_scale.to(dtype).reshape(()).exp() * one_if_finite(log_scale)


def clamp_own(log_scale: Tensor, max_scale: float) -> None:
    # CLIP holds the parameter itself: a limit on 1/τ alone would also cut off the gradient that leads back
    with torch.no_grad():
        log_scale.copy_(torch.where(log_scale.isinf(), log_scale, log_scale.clamp(max=math.log(max_scale))))
