"""The groups of arguments that the compiled kernels take."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]


class TextRows(NamedTuple):
    """Texts whose words are adjacent rows of a tile."""

    texts: Array  # [t]: where their scores stand
    starts: Array  # [t + 1]: at which row of the tile each begins
    scale: Array  # [t]: values of a pair tie if they are apart by no more than the product of its scales


class ImageColumns(NamedTuple):
    """Images whose regions are the columns of a tile, place by place."""

    images: Array  # [i]: where their scores stand
    lengths: Array  # [i]: their numbers of regions, descending, at least 1
    places: Array  # [longest + 1]: at which column each place begins
    scale: Array  # [i]


class ScoreArrays(NamedTuple):
    """Scores, or their gradients (then k may be 0: none flows back from q)."""

    mean_i2t: Array  # [I, T]
    mean_t2i: Array  # [T, I]
    top_i2t: Array  # [I, T, k]
    top_t2i: Array  # [T, I, k]
