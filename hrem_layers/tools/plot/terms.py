"""The terms of the loss over the steps of a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from hrem_layers._core.checks import check_int
from hrem_layers.loss import HREMTerms
from hrem_layers.tools.diagnosis.history import read_history, series
from hrem_layers.tools.plot.style import LINES, new_figure, text_style

PAIR_TERMS = ("base", "enhanced", "cross_image", "cross_text")
LABELS = {
    "base": "base L(v, u)",
    "enhanced": "enhanced L(v̄, ū)",
    "cross_image": "cross L(v̄, u)",
    "cross_text": "cross L(v, ū)",
    "regularization": "L_reg",
}


def plot_terms(
    history: Sequence[HREMTerms | Mapping[str, float | Tensor]],
    *,
    warmup_steps: int = 0,
    smooth: int = 1,
    chance: float | None = None,
) -> Figure:
    """Pair losses above, each by itself and unweighted; L_reg below, on a scale of its own.

    Steps in which a relational term is 0 because it was not computed (warm-up) are left out of its line, so that the
    end of
    a warm-up looks like the beginning of a line and not like an explosion.

    Args:
        history: one entry per step: :class:`~hrem_layers.HREMTerms`, or a mapping with its names; others are passed
            over.
        warmup_steps: shaded, if more than 0.
        smooth: mean over so many steps, at least 1; the values themselves stay visible, paler.
        chance: where the pair losses would be if all similarities were equal, as a horizontal line: 2·N·margin for
            TripletLoss, 2·margin with ``reduction="mean"``.

    Returns:
        A figure.

    Raises:
        TypeError, ValueError: history is none, or empty.
    """
    records = read_history(history)
    check_int("warmup_steps", warmup_steps, minimum=0)
    check_int("smooth", smooth, minimum=1)
    if not any(series(records, name) for name in LABELS):
        raise ValueError(f"history must hold at least one of {', '.join(LABELS)}, got {len(records)} entries without")
    values = {name: np.array([record.get(name, np.nan) for record in records]) for name in LABELS}
    for name in LABELS:
        if name != "base":
            values[name] = np.where(values[name] == 0, np.nan, values[name])
    regularized = bool(np.isfinite(values["regularization"]).any())
    with text_style():
        figure = new_figure(7.2, 4.6 if regularized else 3.4)
        rows = 2 if regularized else 1
        axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=(3, 1)[:rows])
        above = axes[0, 0]
        for name, style in zip(PAIR_TERMS, LINES, strict=False):
            _line(above, LABELS[name], values[name], style, smooth)
        if chance is not None:
            above.axhline(chance, color="#767676", linewidth=1)
            above.annotate(
                "all similarities equal", (1, chance), xycoords=("axes fraction", "data"), xytext=(-4, 3),
                textcoords="offset points", ha="right", fontsize=8, color="#595959",
            )  # fmt: skip
        above.set_ylabel("pair loss, unweighted")
        if regularized:
            _line(axes[1, 0], LABELS["regularization"], values["regularization"], LINES[4], smooth)
            axes[1, 0].set_ylabel("L_reg")
        for ax in axes.ravel():
            if warmup_steps:
                ax.axvspan(0, warmup_steps, color="#e8e8e8", zorder=0)
            ax.spines[["top", "right"]].set_visible(False)
            ax.grid(axis="y", color="#dddddd", linewidth=0.6)
            ax.set_xlim(0, max(len(records) - 1, 1))
        if warmup_steps:
            above.annotate(
                "warm-up", (warmup_steps / 2, 1), xycoords=("data", "axes fraction"), xytext=(0, -4),
                textcoords="offset points", ha="center", va="top", fontsize=8.5, color="#404040",
            )  # fmt: skip
        axes[-1, 0].set_xlabel("step")
        above.legend(frameon=False, ncols=2, fontsize=8.5, handlelength=3.2)
    return figure


def _line(ax: Axes, label: str, values: np.ndarray, style: tuple[object, ...], smooth: int) -> None:
    colour, dashes, marker = style
    steps = np.arange(len(values))
    if not np.isfinite(values).any():
        return
    if smooth > 1:
        ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    every = max(len(values) // 8, 1)
    ax.plot(
        steps, _running_mean(values, smooth), color=colour, linestyle=dashes, marker=marker, markevery=every,
        markersize=4, linewidth=1.5, label=label,
    )  # fmt: skip


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Over the last ``width`` steps that have a value; NaN where there is none yet."""
    known = np.isfinite(values)
    sums, counts = np.cumsum(np.where(known, values, 0)), np.cumsum(known)
    before = np.arange(len(values)) - width
    sums -= np.where(before >= 0, sums[before], 0)
    counts = counts - np.where(before >= 0, counts[before], 0)
    return np.where(known, sums / np.maximum(counts, 1), np.nan)
