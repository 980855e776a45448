"""What a drawing looks like, without any network: where which colours are, and which way the edges run.

The classical descriptors of a small picture: a thumbnail of 8 x 8 mean colours, and for each of 8 x 8 cells a
histogram of the gradient's direction weighted by its size, normalised by cell (Dalal and Triggs, CVPR 2005). They are
computed in a second, need no weights, and say enough of a drawing on white.
"""

from __future__ import annotations

import numpy as np

SIZE = 64  # pixels
CELLS = 8  # each way
DIRECTIONS = 8  # of an edge, in [0, pi)
FEATURES = CELLS * CELLS * (3 + DIRECTIONS)


def describe(pictures: np.ndarray) -> np.ndarray:
    """``pictures`` (n, 64, 64, 3) uint8 -> (n, 704) float32, colours in [-1, 1], histograms in [0, 1].

    Raises:
        ValueError: another shape or type.
    """
    if pictures.ndim != 4 or pictures.shape[1:] != (SIZE, SIZE, 3) or pictures.dtype != np.uint8:
        raise ValueError(
            f"pictures: expected uint8 of shape (n, {SIZE}, {SIZE}, 3), got {pictures.dtype} {pictures.shape}"
        )
    x = pictures.astype(np.float32) / 255
    colours = _cells(x).mean(axis=(2, 4)) * 2 - 1  # [n, c, c, 3]
    dy, dx = np.gradient(x.mean(axis=3), axis=(1, 2))
    size = np.hypot(dx, dy)
    direction = np.floor(np.arctan2(dy, dx) % np.pi / np.pi * DIRECTIONS).astype(int) % DIRECTIONS
    edges = np.where(direction[..., None] == np.arange(DIRECTIONS), size[..., None], 0)
    histogram = _cells(edges).sum(axis=(2, 4))  # [n, c, c, d]
    histogram /= np.sqrt(np.square(histogram).sum(axis=3, keepdims=True) + 0.1)  # a faint edge stays faint
    return np.concatenate([colours.reshape(len(x), -1), histogram.reshape(len(x), -1)], axis=1).astype(np.float32)


def _cells(x: np.ndarray) -> np.ndarray:
    """(n, 64, 64, k) -> (n, c, 8, c, 8, k)."""
    n, _, _, k = x.shape
    return x.reshape(n, CELLS, SIZE // CELLS, CELLS, SIZE // CELLS, k)
