"""What the pictures have in common: colours, sizes, figures without global state, and arrays from whatever is given."""

from __future__ import annotations

import textwrap
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from hrem_layers._core.checks import said

SEQUENTIAL = "cividis"
"""Grows in lightness only, and reads alike with and without red-green vision."""
ON_WHITE = SEQUENTIAL + "_r"
"""The same from light to dark: beside white for "nothing there", the strongest is what differs most, in grey too."""

# Okabe and Ito's colours, told apart with every kind of colour vision; dashes and markers tell them apart in grey
LINES = (
    ("#000000", "-", "o"),
    ("#0072b2", "--", "s"),
    ("#d55e00", "-.", "^"),
    ("#009e73", ":", "D"),
    ("#cc79a7", (0, (5, 1, 1, 1, 1, 1)), "v"),
    ("#e69f00", (0, (1, 1)), "P"),
)
TEXT: Any = {"font.size": 9, "axes.titlesize": 9.5, "axes.labelsize": 9, "svg.fonttype": "path"}


def new_figure(width: float, height: float) -> Figure:
    """In inches; drawn without pyplot, so that nothing stays open and no window appears."""
    figure = Figure(figsize=(width, height), layout="constrained", dpi=120, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def text_style() -> Any:
    return rc_context(TEXT)


def to_array(x: Tensor) -> npt.NDArray[Any]:
    """On the host, in float32 where it is a number."""
    x = x.detach().cpu()
    return np.asarray(x.float().numpy() if x.dtype.is_floating_point else x.numpy())


def check_picture(name: str, picture: object) -> npt.NDArray[Any]:
    """An image to show: (H, W), (H, W, 3 or 4), uint8 or floats in [0, 1], or a PIL image."""
    array = np.asarray(picture.detach().cpu() if isinstance(picture, Tensor) else picture)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)) or array.dtype == object:
        got = f"an array of shape {array.shape}, {array.dtype}" if array.dtype != object else said(picture)
        hint = "; move the channels to the end" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ValueError(f"{name} must be an image (H, W), (H, W, 3) or (H, W, 4), got {got}{hint}")
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if array.size and (float(np.nanmin(array)) < 0 or float(np.nanmax(array)) > 1):
            low, high = float(np.nanmin(array)), float(np.nanmax(array))
            raise ValueError(f"{name} must be uint8 or lie in [0, 1], got values from {low:.3g} to {high:.3g}")
    return array


def plain(text: object) -> str:
    """Without mathematics: a dollar in a caption is a dollar."""
    return str(text).replace("$", r"\$")


def wrapped(text: object, width: int, lines: int = 2) -> str:
    return plain("\n".join(textwrap.wrap(str(text), width, max_lines=lines, placeholder=" …") or [""]))
