"""Greedy k-means++: rows to begin k-means from, far from one another.

scikit-learn's ``kmeans_plusplus`` does the same and checks its input again at every step, which for some thousand rows
takes five times as long as the distances.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hrem_layers.sampler.features import Floats

_FEW_PAIRS = 2**22  # up to so many distances (32 MB) are computed at once, in a third of the time


def plus_plus(rows: Floats, number: int, weights: Floats | None, state: int) -> npt.NDArray[np.intp]:
    """Which ``number`` of the rows (n, D) to begin from.

    Each is drawn with a probability in proportion to weight times squared distance to the nearest of those before it:
    of a few such draws the one that lowers the sum of these most (Arthur and Vassilvitskii, 2007, section 5).

    Args:
        rows: n of at least ``number``.
        weights: (n,), at least 0 and not all 0; None = all 1.
        state: a seed of 32 bits.

    Returns:
        (number,), in the order in which they were drawn. None twice unless all others are equal to one of them.
    """
    random = np.random.RandomState(state)  # its numbers are the same in every version of NumPy
    wide = rows.astype(np.float64)
    weighed = np.ones(len(wide)) if weights is None else weights.astype(np.float64)
    lengths = np.einsum("nd,nd->n", wide, wide)
    every = _squared_distances(wide, lengths, np.arange(len(wide))) if len(wide) ** 2 <= _FEW_PAIRS else None

    def distances(of: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        return _squared_distances(wide, lengths, of) if every is None else every[of]

    trials = 2 + int(math.log(number))
    chosen = np.empty(number, np.intp)
    chosen[:1] = _draw(weighed, random.random_sample(1))
    nearest = distances(chosen[:1])[0]
    for place in range(1, number):
        drawn = _draw(weighed * nearest, random.random_sample(trials))
        nearer = distances(drawn)
        np.minimum(nearer, nearest, out=nearer)
        best = int((nearer @ weighed).argmin())
        chosen[place], nearest = drawn[best], nearer[best]
    return chosen


def _draw(masses: npt.NDArray[np.float64], random: npt.NDArray[np.float64]) -> npt.NDArray[np.intp]:
    """Places drawn in proportion to ``masses`` (n,), one for each number in [0, 1)."""
    sums = masses.cumsum()
    places: npt.NDArray[np.intp] = sums.searchsorted(random * sums[-1], side="right")
    return np.minimum(places, len(sums) - 1)


def _squared_distances(
    rows: npt.NDArray[np.float64], lengths: npt.NDArray[np.float64], of: npt.NDArray[np.intp]
) -> npt.NDArray[np.float64]:
    """(len(of), n): of these rows to all; ``lengths`` are squared. Exactly 0 to themselves."""
    out = rows[of] @ rows.T
    out *= -2
    out += lengths
    out += lengths[of, None]
    np.maximum(out, 0, out=out)
    out[np.arange(len(of)), of] = 0
    return out
