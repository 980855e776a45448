"""From whom one sample of the batch receives, as thumbnails and captions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpecFromSubplotSpec
from torch import Tensor

from hrem_layers._core.checks import check_choice, check_int, said
from hrem_layers.relations import AnyGraph, RelationGraph, SparseRelationGraph
from hrem_layers.tools.plot.style import check_picture, new_figure, plain, text_style, to_array, wrapped


def plot_neighbors(
    graph: AnyGraph,
    index: int,
    *,
    node: str = "image",
    images: Sequence[object] | None = None,
    captions: Sequence[str] | None = None,
    image_index: Tensor | None = None,
    limit: int = 5,
) -> Figure:
    """One image or text and the images and texts that it receives from, by falling relevance.

    Args:
        graph: over N images and M texts.
        index: which image, in [0, N), or which text, in [0, M).
        node: ``"image"`` or ``"text"``: what ``index`` counts.
        images: N pictures (arrays (H, W, 3) of uint8 or floats in [0, 1], or PIL images); None = numbers instead.
        captions: M strings; None = numbers instead.
        image_index: (M,) integer, the image that each text describes, to mark what belongs to the sample; None = row
            by row.
        limit: neighbours shown per modality, at least 1.

    Returns:
        A figure: the sample on the left; its neighbours among the images above, among the texts below, each with
        its relevance S. What belongs together with the sample has a frame and a star.

    Raises:
        TypeError, ValueError: an argument has the wrong type, length or range.
    """
    if not isinstance(graph, (RelationGraph, SparseRelationGraph)):
        raise TypeError(f"graph must be a RelationGraph, got {said(graph)}")
    graph = graph.dense()
    check_choice("node", node, ("image", "text"))
    n = graph.connection.shape[0] // 2 if graph.num_images is None else graph.num_images
    m = graph.connection.shape[0] - n
    check_int("index", index, minimum=0, maximum=(n if node == "image" else m) - 1)
    check_int("limit", limit, minimum=1)
    for name, given, count in (("images", images, n), ("captions", captions, m)):
        if given is not None and len(given) != count:
            raise ValueError(f"{name} must hold {count}, one per {name[:-1]} of the graph, got {len(given)}")
    if image_index is None and n != m:
        raise ValueError(f"image_index must say which of {n} images each of {m} texts describes, got None")
    owner = np.arange(m) if image_index is None else to_array(image_index)
    if owner.shape != (m,):
        raise ValueError(f"image_index must have shape ({m},), got {owner.shape}")

    letter = node[0]
    own = index if node == "image" else int(owner[index])
    with text_style():
        figure = new_figure(2.2 + 1.5 * limit, 4.4)
        outer = figure.add_gridspec(1, 2, width_ratios=(1.25, limit))
        self_ax = figure.add_subplot(outer[0])
        _show(self_ax, node, index, images, captions, lines=6)
        self_ax.set_title(plain(f"{node} {index} receives from"), fontweight="bold")
        rows = GridSpecFromSubplotSpec(2, 1, subplot_spec=outer[1], height_ratios=(1.25, 1))
        for row, (kind, other) in enumerate((("image", "i"), ("text", "t"))):
            block = graph.block(f"{letter}2{other}")
            edges, relevance = to_array(block.connection[index]), to_array(block.relevance[index])
            if kind == node:
                edges[index] = False  # itself
            order = [int(x) for x in np.argsort(-relevance, kind="stable") if edges[x]]
            cells = GridSpecFromSubplotSpec(1, limit, subplot_spec=rows[row])
            for place in range(limit):
                ax = figure.add_subplot(cells[place])
                if place >= len(order):
                    ax.axis("off")
                    if place == 0:
                        ax.text(0.5, 0.5, f"no {kind}", ha="center", va="center")
                    continue
                other_index = order[place]
                belongs = (other_index if kind == "image" else int(owner[other_index])) == own
                _show(ax, kind, other_index, images, captions, lines=5, belongs=belongs)
                ax.set_title(("★ " if belongs else "") + f"S = {relevance[other_index]:.2f}", fontsize=8.5)
                if place == 0:
                    more = f" of {len(order)}" if len(order) > limit else ""
                    ax.set_ylabel(f"{kind}s ({min(limit, len(order))}{more})")
    return figure


def _show(
    ax: Axes,
    kind: str,
    index: int,
    images: Sequence[object] | None,
    captions: Sequence[str] | None,
    *,
    lines: int,
    belongs: bool = False,
) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set_color("#0072b2" if belongs else "#b0b0b0")
        side.set_linewidth(2.4 if belongs else 0.8)
    if kind == "image" and images is not None:
        ax.imshow(check_picture(f"images[{index}]", images[index]), cmap="gray")
        return
    text = f"{kind} {index}" if kind == "image" or captions is None else captions[index]
    ax.set_xlim(0, 1)
    ax.set_ylim(0, 1)
    ax.text(0.5, 0.5, wrapped(text, 15, lines), ha="center", va="center", fontsize=8.5)
    if kind == "image":
        ax.set_aspect("equal")
