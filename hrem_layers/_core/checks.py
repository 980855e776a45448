"""Checks of what the caller gave: the argument's name, what was expected, what came.

Every check but :func:`check_indices` looks only at Python values, shapes, dtypes and devices, never at the elements of
a tensor; none of them makes a GPU wait or breaks a traced graph.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor, nn

from hrem_layers._core.numerics import autocast_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""What floating-point tensors may be; 8-bit floats have no arithmetic."""

HALF_MIXTURES = ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16))
"""Dtypes of weights and of autocast that PyTorch's kernels do not take together."""


def said(value: object) -> str:
    """What an error says of a value that came, in one short line."""
    if isinstance(value, Tensor):
        return f"a tensor of {describe(value)}"
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def check_int(name: str, value: object, *, minimum: int, maximum: int = 2**63 - 1) -> int:
    """An int in ``[minimum, maximum]``, NumPy's included; a bool is none."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got {said(value)}")
    number = int(value)
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {said(value)}")
    if number > maximum:
        raise ValueError(f"{name} must be at most {maximum}, got {said(value)}")
    return number


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
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {said(value)}")
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    if not (math.isfinite(number) and minimum <= number <= maximum and above < number < below):
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
        raise ValueError(f"{name} must be {' and '.join(['finite', *bounds])}, got {said(value)}")
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {said(value)}")
    return bool(value)


def check_choice(name: str, value: object, choices: Collection[str]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {said(value)}")
    return value


def describe(tensor: Tensor) -> str:
    """``shape (4, 36, 1024), torch.float32, cpu``: what an error says of a tensor that came."""
    shape = "nested" if tensor.is_nested else f"shape {tuple(tensor.shape)}"
    layout = "" if tensor.layout == torch.strided else f", {tensor.layout}"
    return f"{shape}, {tensor.dtype}, {tensor.device}{layout}"


def holds_values(tensor: Tensor) -> bool:
    """Whether it is a dense tensor whose elements can be read."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_quantized or tensor.is_meta)


def check_tensor(
    name: str, tensor: object, shape: tuple[int | str, ...], *, device: torch.device | None = None
) -> Tensor:
    """A dense tensor of float16, bfloat16, float32 or float64 and the given shape; a letter stands for any size."""
    checked = _check_dense(name, tensor, shape, device)
    if not checked.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {describe(checked)}")
    if checked.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {describe(checked)}")
    return checked


def check_sides(
    image_embedding: Tensor, text_embedding: Tensor, count: int | str | None = "M", size: int | str = "D"
) -> None:
    """Images (N, size) and texts (count, size; None = N) on one device, at least 1 wide."""
    check_tensor("image_embedding", image_embedding, ("N", size))
    n, d = image_embedding.shape
    if d < 1:
        raise ValueError(f"image_embedding must be at least 1 wide, got {describe(image_embedding)}")
    check_tensor("text_embedding", text_embedding, (n if count is None else count, d), device=image_embedding.device)


def check_index_tensor(
    name: str, tensor: object, shape: tuple[int | str, ...], *, device: torch.device | None = None
) -> Tensor:
    """A dense tensor of integers (bool is none) and the given shape; what they are is not looked at."""
    checked = _check_dense(name, tensor, shape, device, "an integer tensor")
    if checked.dtype.is_floating_point or checked.dtype.is_complex or checked.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {describe(checked)}")
    return checked


def check_indices(name: str, index: Tensor, count: int, what: str) -> None:
    """All in [0, count). On a GPU a look at them would make it wait: there indexing itself stops at a wrong one."""
    if index.device.type == "cpu" and index.numel() and not torch.compiler.is_compiling():
        low, high = (int(x) for x in index.aminmax())
        if low < 0 or high >= count:
            raise ValueError(f"{name} must lie in [0, {count}), the {what}, got {low} to {high}")


def check_bool_tensor(
    name: str,
    tensor: object,
    shape: tuple[int | str, ...],
    *,
    device: torch.device | None = None,
    meaning: str = "real",
) -> Tensor:
    """A dense bool tensor of the given shape, in which True stands for ``meaning``."""
    checked = _check_dense(name, tensor, shape, device, "a bool tensor")
    if checked.dtype != torch.bool:
        raise TypeError(f"{name} must be a bool tensor (True = {meaning}), got {describe(checked)}")
    return checked


def check_weights(name: str, tensor: Tensor, module: nn.Module) -> None:
    """``tensor`` must lie where the module's weights do, and autocast not be to the half type that they are not."""
    for weight in module.parameters():
        if weight.device != tensor.device:
            raise ValueError(
                f"{name} must be on {weight.device} like the weights of {type(module).__name__}, got {describe(tensor)}"
            )
        cast = autocast_dtype(weight.device)
        if (weight.dtype, cast) in HALF_MIXTURES:
            raise TypeError(
                f"autocast must be off, or to {weight.dtype} like the weights of {type(module).__name__}, got {cast}"
            )
        break


def _check_dense(
    name: str, tensor: object, shape: tuple[int | str, ...], device: torch.device | None, kind: str = "a tensor"
) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {kind} of shape {_tuple(shape)}, got {type(tensor).__name__}")
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_quantized:
        raise TypeError(f"{name} must be {kind} in the dense (strided) layout, got {describe(tensor)}")
    if tensor.dim() != len(shape) or any(
        not isinstance(want, str) and got != want for got, want in zip(tensor.shape, shape, strict=True)
    ):
        raise ValueError(f"{name} must have shape {_tuple(shape)}, got {describe(tensor)}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like the other inputs, got {describe(tensor)}")
    return tensor


def _tuple(shape: tuple[int | str, ...]) -> str:
    # only for a message: torch.compile cannot print a size that it keeps symbolic
    return "(" + ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "") + ")"
