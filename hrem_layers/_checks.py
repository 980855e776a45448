"""Checks of what the caller gave: the argument's name, what was expected, what came.

Every check looks only at Python values, shapes, dtypes and devices, never at the elements of a
tensor, so that none of them makes a GPU wait or breaks a traced graph.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor


def _said(value: object) -> str:
    return f"{value!r} ({type(value).__name__})"


def check_int(name: str, value: object, *, minimum: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {_said(value)}")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return value


def check_number(
    name: str,
    value: object,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
) -> float:
    """A finite real number in ``[minimum, maximum]`` and strictly between ``above`` and ``below``."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {_said(value)}")
    if not (math.isfinite(value) and minimum <= value <= maximum and above < value < below):
        bounds = [
            text
            for text, given in (
                (f"at least {minimum}", minimum > -math.inf),
                (f"greater than {above}", above > -math.inf),
                (f"at most {maximum}", maximum < math.inf),
                (f"less than {below}", below < math.inf),
            )
            if given
        ]
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}, got {value}")
    return float(value)


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_said(value)}")
    return value


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value  # type: ignore[return-value]


def describe(tensor: Tensor) -> str:
    """``shape (4, 36, 1024), torch.float32, cpu``: what an error says of a tensor that came."""
    return f"shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device}"


def check_tensor(
    name: str, tensor: object, shape: tuple[int | str, ...], *, device: torch.device | None = None
) -> Tensor:
    """A floating-point tensor of the given shape; a letter in ``shape`` stands for any size."""
    _check_shape(name, tensor, shape, device)
    if not tensor.dtype.is_floating_point:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(tensor)}")  # type: ignore[arg-type]
    return tensor  # type: ignore[return-value]


def check_bool_tensor(
    name: str, tensor: object, shape: tuple[int | str, ...], *, device: torch.device | None = None
) -> Tensor:
    """A bool tensor of the given shape."""
    _check_shape(name, tensor, shape, device)
    if tensor.dtype != torch.bool:  # type: ignore[attr-defined]
        raise TypeError(f"{name} must be a bool tensor (True = real), got {describe(tensor)}")  # type: ignore[arg-type]
    return tensor  # type: ignore[return-value]


def _check_shape(name: str, tensor: object, shape: tuple[int | str, ...], device: torch.device | None) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor of shape {_tuple(shape)}, got {type(tensor).__name__}")
    if tensor.dim() != len(shape) or any(
        not isinstance(want, str) and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {_tuple(shape)}, got {describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {describe(tensor)}")


def _tuple(shape: tuple[int | str, ...]) -> str:
    # only for a message: torch.compile cannot print a size that it keeps symbolic
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
