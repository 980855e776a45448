"""Random keys, sorting by several keys, and ranges of different lengths: what the batch sampler is made from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Keys = npt.NDArray[np.uint64]
Draw = Callable[[int], Keys]


def random_keys(seed: int, epoch: int) -> Draw:
    """``draw(n)`` gives n random 64-bit keys; a stream of its own for every (seed, epoch)."""
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(epoch,)))
    return lambda n: bits.random_raw(n).astype(np.uint64, copy=False)


def no_keys(n: int) -> Keys:
    """In place of :func:`random_keys` without shuffling: every tie falls to the lower index."""
    return np.zeros(n, np.uint64)


def sort_by(keys: Sequence[tuple[npt.NDArray[Any], int]], last: Keys | None = None) -> Ints:
    """Indices in the order of the keys, the first counting most, each given with its exclusive upper bound; then
    of as many leading bits of ``last`` as there is room for; then of the index. Unique, hence the same everywhere.
    """
    n = len(keys[0][0]) if last is None else len(last)
    if n < 2:
        return np.arange(n)
    index_bits = (n - 1).bit_length()
    bits = [max(bound - 1, 0).bit_length() for _, bound in keys]
    room = min(64 - index_bits - sum(bits), 63)
    if room < (0 if last is None else 12):  # slower, but for any size
        columns = [key for key, _ in reversed(keys)]
        return np.lexsort(columns if last is None else [last, *columns])
    packed = np.zeros(n, np.uint64)
    for (key, _), width in zip(keys, bits, strict=True):
        packed <<= np.uint64(width)
        packed |= key.astype(np.uint64)
    if last is not None:
        packed <<= np.uint64(room)
        packed |= last >> np.uint64(64 - room)
    packed <<= np.uint64(index_bits)
    packed |= np.arange(n, dtype=np.uint64)
    packed.sort()
    packed &= np.uint64((1 << index_bits) - 1)
    return packed.view(np.int64)


def ragged(starts: Ints, sizes: Ints) -> Ints:
    """``start, start + 1, ... start + size - 1`` for each pair, one after the other."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(int(sizes.sum()))


def run_starts(*keys: Ints) -> Bools:
    """True where a run of equal keys begins."""
    new = np.ones(len(keys[0]), bool)
    if len(new):
        new[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return new
