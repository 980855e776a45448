"""Connection and relevance of a batch as two matrices of four blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from hrem_layers._core.checks import said
from hrem_layers.relations import AnyGraph, RelationGraph, SparseRelationGraph, check_graph
from hrem_layers.tools.plot.style import ON_WHITE, new_figure, text_style, to_array

BLOCK_NAMES = (("images from images", "images from texts"), ("texts from images", "texts from texts"))


def plot_graph(graph: AnyGraph, *, all_relevance: bool = False) -> Figure:
    """A and S of a batch, images first: the row is the node that receives.

    The colours of S are scaled in each block by itself, for the blocks have different units: across the modalities
    relevance is learned, within one it is a function of the distance, with a sample's own
    value (1, the diagonal) left out of the scale. The bars beside say which colour is which value: the darker, the
    more relevant.

    Args:
        graph: over N images and M texts, from ``loss.relate(...)`` or an :class:`hrem_layers.AssociationGraph`.
        all_relevance: show S also where there is no edge; it plays no part there.

    Returns:
        A figure of connection (left) and relevance (right).

    Raises:
        TypeError, ValueError: graph is not a RelationGraph, or its fields do not fit.

    Example:
        >>> import torch
        >>> from hrem_layers import AssociationGraph
        >>> from hrem_layers.tools import plot
        >>> v, u = torch.randn(8, 64), torch.randn(8, 64)
        >>> graph = AssociationGraph()(v, u, torch.randn(8, 36, 64), torch.randn(8, 12, 64))
        >>> plot.plot_graph(graph).savefig("graph.png")  # doctest: +SKIP
    """
    if not isinstance(graph, (RelationGraph, SparseRelationGraph)):
        raise TypeError(f"graph must be a RelationGraph, got {said(graph)}")
    graph = graph.dense()
    nodes = graph.connection.shape[0]
    n = nodes // 2 if graph.num_images is None else graph.num_images
    check_graph(graph, n, nodes - n, graph.connection.device)
    connection, relevance = to_array(graph.connection), to_array(graph.relevance)
    shown = relevance if all_relevance else np.where(connection, relevance, np.nan)
    with text_style():
        figure = new_figure(8.6, 3.9)
        left, right, bars = figure.subplots(1, 3, width_ratios=(1, 1, 0.48))
        bars.axis("off")
        colours = ListedColormap(["#ffffff", "#1a1a1a"])
        left.imshow(connection, cmap=colours, vmin=0, vmax=1, interpolation="nearest")
        left.set_title("connection A: black = edge")
        _frame(left, n, nodes)
        _relevance(figure, right, bars, shown, n)
        right.set_title("relevance S" + ("" if all_relevance else " (white: no edge)"))
        _frame(right, n, nodes)
    return figure


def _relevance(figure: Figure, ax: Axes, bars: Axes, values: npt.NDArray[Any], n: int) -> None:
    nodes = len(values)
    for row, (top, bottom) in enumerate(((0, n), (n, nodes))):
        for column, (start, end) in enumerate(((0, n), (n, nodes))):
            block = values[top:bottom, start:end]
            if not block.size:
                continue
            others = block[~np.eye(len(block), dtype=bool)] if row == column else block  # a sample's 1 for itself aside
            finite = others[np.isfinite(others)]
            low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
            image = ax.imshow(
                block, cmap=ON_WHITE, vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest",
                extent=(start - 0.5, end - 0.5, bottom - 0.5, top - 0.5),
            )  # fmt: skip
            # two bars on the right, one above the other per row of blocks and side by side per column
            place = bars.inset_axes((0.52 * column, 0.55 - 0.5 * row, 0.09, 0.33))
            figure.colorbar(image, cax=place)
            place.set_title(BLOCK_NAMES[row][column].replace(" from ", "\nfrom "), fontsize=7, loc="left")
            place.tick_params(labelsize=7)
    ax.set_xlim(-0.5, nodes - 0.5)
    ax.set_ylim(nodes - 0.5, -0.5)


def _frame(ax: Axes, n: int, nodes: int) -> None:
    """Lines between the blocks, and what rows and columns are."""
    for draw in (ax.axhline, ax.axvline):
        draw(n - 0.5, color="white", linewidth=4)
        draw(n - 0.5, color="#d55e00", linewidth=1.6)
    middles = [(n - 1) / 2, (n + nodes - 1) / 2]
    ax.set_xticks(middles, [f"{n} images", f"{nodes - n} texts"])
    ax.set_yticks(middles, [f"{n} images", f"{nodes - n} texts"], rotation=90, va="center")
    ax.tick_params(length=0)
    ax.set_xlabel("gives")
    ax.set_ylabel("receives")
