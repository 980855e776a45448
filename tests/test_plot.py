"""The pictures hold what they say, whatever the batch, and refuse what they cannot show."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

pytest.importorskip("matplotlib")

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from hrem_layers import AssociationGraph, HREMLoss, RelationGraph
from hrem_layers.tools import plot
from hrem_layers.tools.plot.style import LINES, ON_WHITE, SEQUENTIAL

N, M, D = 5, 8, 16
INDEX = torch.tensor([0, 0, 1, 2, 2, 3, 4, 4])


def graph(**options) -> RelationGraph:
    torch.manual_seed(0)
    v, u, regions, words = (torch.randn(*s) for s in ((N, D), (M, D), (N, 6, D), (M, 4, D)))
    return AssociationGraph(topk=3, **options)(v, u, regions, words, image_index=INDEX)


def drawn(figure: object) -> Figure:
    assert isinstance(figure, Figure)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=40)
    assert data.getbuffer().nbytes > 1000
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in (*ax.texts, ax.title, ax.yaxis.label, ax._left_title)]


def test_connection_is_shown_as_it_is() -> None:
    given = graph()
    figure = drawn(plot.plot_graph(given))
    shown = figure.axes[0].images[0].get_array()
    assert np.array_equal(np.asarray(shown), given.connection.numpy())
    blocks = [np.ma.filled(image.get_array(), np.nan) for image in figure.axes[1].images]
    assert [block.shape for block in blocks] == [(N, N), (N, M), (M, N), (M, M)]
    for name, block in zip(("i2i", "i2t", "t2i", "t2t"), blocks, strict=True):
        connection, relevance = given.block(name)
        assert np.array_equal(np.isnan(block), ~connection.numpy())
        assert np.allclose(block[connection.numpy()], relevance[connection].detach().numpy())


@pytest.mark.parametrize("given", [
    graph(candidates=2), graph(exclude_positives=True), graph()._replace(relevance=torch.full((13, 13), torch.nan)),
    graph()._replace(connection=torch.zeros(13, 13, dtype=torch.bool)),
    RelationGraph(torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)),
    RelationGraph(torch.ones(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bfloat16)),
])  # fmt: skip
def test_any_graph_can_be_shown(given: RelationGraph) -> None:
    drawn(plot.plot_graph(given))
    drawn(plot.plot_graph(given, all_relevance=True))


@pytest.mark.parametrize(("node", "index"), [("image", 2), ("text", 7)])
def test_neighbours_come_by_falling_relevance(node: str, index: int) -> None:
    given, captions = graph(), [f"caption {i}" for i in range(M)]
    figure = drawn(plot.plot_neighbors(given, index, node=node, captions=captions, image_index=INDEX, limit=3))
    for kind, block in (("image", f"{node[0]}2i"), ("text", f"{node[0]}2t")):
        connection, relevance = given.block(block)
        edges = connection[index].clone()
        if kind == node:
            edges[index] = False
        order = [i for i in relevance[index].argsort(descending=True).tolist() if edges[i]][:3]
        for i in order:
            assert any(f"S = {relevance[index, i]:.2f}" in text for text in texts(figure)), (kind, i)
            assert (f"image {i}" if kind == "image" else f"caption {i}") in texts(figure)


def test_what_belongs_together_has_a_star() -> None:
    given = graph()._replace(connection=torch.ones(N + M, N + M, dtype=torch.bool))
    figure = drawn(plot.plot_neighbors(given, 2, image_index=INDEX, limit=M))
    assert sum(text.startswith("★") for text in texts(figure)) == 2  # its two captions


def test_neighbours_with_pictures_of_every_kind() -> None:
    pictures = [np.zeros((4, 6, 3), dtype=np.uint8), torch.rand(4, 4, 3), np.random.rand(5, 4), torch.rand(3, 3, 4),
                np.zeros((2, 2, 3))]  # fmt: skip
    drawn(plot.plot_neighbors(graph(), 0, images=pictures, captions=["$5 & $6"] * M, image_index=INDEX))


CELLS, WORDS = torch.randn(6, D), torch.randn(4, D)
PICTURE = np.zeros((20, 30, 3), dtype=np.uint8)


def test_the_frame_lies_on_the_best_real_region() -> None:
    cells, mask = CELLS.clone(), torch.tensor([True, True, True, True, True, False])
    cells[4] = 3 * WORDS[1]
    cells[5] = 7 * WORDS[1]  # not real
    figure = drawn(plot.plot_alignment(cells, WORDS, picture=PICTURE, grid=(2, 3), image_mask=mask))
    frames = [patch for patch in figure.axes[2].patches if not patch.get_fill()]
    assert {frame.get_xy() for frame in frames} == {(9.5, 9.5)}  # row 1, column 1 of 10 by 10 pixels
    assert len([patch for patch in figure.axes[2].patches if patch.get_fill()]) == 5


def test_boxes_instead_of_a_grid() -> None:
    boxes = torch.tensor([[0, 0, 29, 19], [2, 3, 9, 8], [1, 1, 4, 4]] * 2).float()
    figure = drawn(plot.plot_alignment(CELLS, WORDS, picture=PICTURE, boxes=boxes, words=list("abcd")))
    drawn_first = next(patch for patch in figure.axes[1].patches if patch.get_fill())
    assert drawn_first.get_width() == 29  # the largest, below the others
    assert [ax.get_title() for ax in figure.axes[:5]] == ["image", *"abcd"]


def test_words_may_be_given_with_or_without_padding() -> None:
    mask = torch.tensor([True, True, True, False])
    for words in (list("abcx"), list("abc")):
        figure = drawn(
            plot.plot_alignment(CELLS, WORDS, picture=PICTURE, grid=(3, 2), words=words, text_mask=mask, columns=2)
        )
        assert [ax.get_title() for ax in figure.axes if ax.get_title()] == ["image", "a", "b", "c"]


def test_terms_leave_the_warm_up_out() -> None:
    history = [{"base": 3.0, "enhanced": 0.0, "cross_image": 0.0, "regularization": 0.0}] * 4
    history += [{"base": 2.0, "enhanced": 1.5, "cross_image": 1.0, "regularization": 0.1}] * 4
    figure = drawn(plot.plot_terms(history, warmup_steps=4, chance=2.5))
    lines = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    assert np.isnan(lines["enhanced L(v̄, ū)"][:4]).all()
    assert (lines["enhanced L(v̄, ū)"][4:] == 1.5).all() and (lines["base L(v, u)"][:4] == 3).all()
    assert "cross L(v, ū)" not in lines  # was not logged
    assert "warm-up" in texts(figure)


def test_smoothing_is_a_running_mean() -> None:
    figure = drawn(plot.plot_terms([{"base": float(i)} for i in range(10)], smooth=3))
    smooth = figure.axes[0].lines[-1].get_ydata()
    assert np.allclose(smooth[2:], np.arange(10)[1:-1]) and np.allclose(smooth[:2], [0, 0.5])


def test_terms_as_the_loss_gives_them() -> None:
    loss = HREMLoss(D)
    drawn(plot.plot_terms([loss.terms(*(torch.randn(*s) for s in ((4, D), (4, D), (4, 3, D), (4, 3, D))))]))


def align(**options) -> Figure:
    return plot.plot_alignment(CELLS, WORDS, **{"picture": PICTURE, **options})


REFUSED = {
    "graph must be a RelationGraph": lambda: plot.plot_graph(torch.zeros(3, 3)),
    "index must be at most 4": lambda: plot.plot_neighbors(graph(), 5, image_index=INDEX),
    "node must be one of": lambda: plot.plot_neighbors(graph(), 0, node="word", image_index=INDEX),
    "captions must hold 8": lambda: plot.plot_neighbors(graph(), 0, captions=["a"], image_index=INDEX),
    "image_index must say": lambda: plot.plot_neighbors(graph(), 0),
    "move the channels to the end": lambda: plot.plot_alignment(CELLS, WORDS, picture=torch.rand(3, 9, 9), grid=(2, 3)),
    r"lie in \[0, 1\], got values from -1": lambda: align(picture=-np.ones((4, 4)), grid=(2, 3)),
    "6 regions are no square": lambda: plot.plot_alignment(CELLS, WORDS, picture=PICTURE),
    "grid must have 6 cells": lambda: plot.plot_alignment(CELLS, WORDS, picture=PICTURE, grid=(2, 2)),
    r"boxes must have shape \(6, 4\)": lambda: align(boxes=np.zeros((2, 4))),
    "words must be a list": lambda: plot.plot_alignment(CELLS, WORDS, picture=PICTURE, grid=(2, 3), words="abcd"),
    "words must hold 4": lambda: plot.plot_alignment(CELLS, WORDS, picture=PICTURE, grid=(2, 3), words=["a"]),
    "text_mask must be": lambda: plot.plot_alignment(
        CELLS, WORDS, picture=PICTURE, grid=(2, 3), text_mask=torch.ones(4)
    ),
    "history must hold": lambda: plot.plot_terms([{"grad_norm": 1.0}]),
    "history must be a sequence": lambda: plot.plot_terms({"base": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_shown_is_refused(message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        REFUSED[message]()


def lightness(colour: np.ndarray) -> float:
    """CIE L* of an sRGB colour."""
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    y = float(linear @ [0.2126, 0.7152, 0.0722])
    return 116 * y ** (1 / 3) - 16 if y > 0.008856 else 903.3 * y


def test_colours_keep_their_order_in_grey_and_lines_differ_without_colour() -> None:
    steps = [lightness(np.array(colormaps[SEQUENTIAL](x)[:3])) for x in np.linspace(0, 1, 20)]
    assert steps == sorted(steps) and steps[-1] - steps[0] > 50
    on_white = [lightness(np.array(colormaps[ON_WHITE](x)[:3])) for x in np.linspace(0, 1, 20)]
    assert on_white == steps[::-1]  # no edge, white, is nearer to the weakest than to the strongest
    assert all(image.get_cmap().name == ON_WHITE for image in plot.plot_graph(graph()).axes[1].images)
    assert len({str(dashes) for _, dashes, _ in LINES}) == len({marker for *_, marker in LINES}) == len(LINES)


def test_without_matplotlib_the_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "import hrem_layers.tools\n"
        "try:\n    from hrem_layers.tools import plot\n"
        "except ModuleNotFoundError as error:\n    print(error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 'pip install "hrem-layers[plot]"' in ran.stdout


def test_pictures_open_no_window_and_leave_nothing_open() -> None:
    code = (
        "import sys; import hrem_layers.tools.plot as p\n"
        "p.plot_terms([{'base': 1.0}])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "import hrem_layers; assert True\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
