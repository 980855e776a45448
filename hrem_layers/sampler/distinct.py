"""No step of an epoch holds two captions of one image where that can be avoided.

:func:`hrem_layers.sampler.batching.arrange` leaves almost none; what is left is mended by exchanging captions between
steps, so that the sizes of the steps stay. A caption that doubles an image in step X goes to a step Y without that
image, and Y gives one to X:

1. by trial, many at a time (here): with partners drawn from the same cluster, which keeps groups whole, then with any,
   then mostly with one another;
2. where no partner is found so, along the shortest chain of steps (``paths.py``); what then remains cannot be avoided.

Dropped captions are one more step, of which nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from hrem_layers.sampler.arrays import Draw, Ints, Keys, sort_by
from hrem_layers.sampler.assignment import Assignment
from hrem_layers.sampler.layout import Layout
from hrem_layers.sampler.paths import exchange_along_paths

_PATIENCE = 10  # trials in a row without an exchange


def keep_distinct(order: Ints, bounds: Ints, layout: Layout, draw: Draw) -> None:
    """Exchange captions in ``order`` (in place) between the steps that ``bounds`` cuts; what lies behind the last
    bound is dropped."""
    images = _doubled_images(order, bounds, layout)
    if not len(images):
        return
    steps = Assignment(order, bounds, layout)
    if _exchange_by_trial(steps, images, draw):
        return
    while exchange_along_paths(steps, images):
        pass


def _doubled_images(order: Ints, bounds: Ints, layout: Layout) -> Ints:
    """Images that come more than once in a step."""
    if layout.counts.max() < 2:
        return np.empty(0, np.int64)
    steps = len(bounds)  # one more than there are: the last stands for the dropped captions
    step = np.empty(layout.captions, np.int64)
    step[order] = np.repeat(np.arange(steps), np.diff(np.append(bounds, layout.captions)))
    pairs = np.repeat(np.arange(len(layout.counts)) * steps, layout.counts) + step
    pairs.sort()
    twice = pairs[1:][pairs[1:] == pairs[:-1]]
    return np.unique(twice[twice % steps != steps - 1] // steps)


def _exchange_by_trial(steps: Assignment, images: Ints, draw: Draw) -> bool:
    """True if none of these images is doubled any more."""
    same_cluster = _SameCluster(steps)
    trials: list[Partners] = [same_cluster] * 8 + [_any_caption] * 4
    trials += [*[_one_another] * 4, _any_caption] * 20
    in_vain = 0
    for partners in trials:
        captions = steps.doubling(images)
        captions = captions[np.unique(steps.image[captions], return_index=True)[1]]  # one per image
        if not len(captions):
            return True
        exchanged = _exchange_where_it_suits(steps, captions, partners(steps, captions, draw(len(captions))))
        in_vain = 0 if exchanged else in_vain + 1
        if in_vain == _PATIENCE:
            break
    return False


def _exchange_where_it_suits(steps: Assignment, ours: Ints, theirs: Ints) -> int:
    """Exchange those pairs that suit both steps; an image takes part once at most, so that none spoils another.

    Returns how many.
    """
    mine, other = steps.image[ours], steps.image[theirs]
    suits = ~steps.holds(steps.step[ours], other)
    suits &= (steps.step[theirs] == steps.dropped) | ~steps.holds(steps.step[theirs], mine)
    ours, theirs = ours[suits], theirs[suits]
    both = np.stack([mine[suits], other[suits]], 1).reshape(-1)
    first = np.zeros(len(both), bool)
    first[np.unique(both, return_index=True)[1]] = True
    single = first.reshape(-1, 2).all(1)
    steps.exchange([ours[single], theirs[single]])
    return int(single.sum())


Partners = Callable[[Assignment, Ints, Keys], Ints]  # a caption to exchange each of these with, by a random key each


def _one_another(steps: Assignment, captions: Ints, keys: Keys) -> Ints:
    return captions[sort_by([], keys)]


def _any_caption(steps: Assignment, captions: Ints, keys: Keys) -> Ints:
    return (keys % np.uint64(len(steps.order))).astype(np.int64)


class _SameCluster:
    """Any caption of any image of the same cluster."""

    def __init__(self, steps: Assignment) -> None:
        layout = steps.layout
        by_cluster = sort_by([(layout.labels, layout.clusters)])
        self.members = by_cluster[layout.counts[by_cluster] > 0]
        self.start = np.searchsorted(layout.labels[self.members], np.arange(layout.clusters + 1))

    def __call__(self, steps: Assignment, captions: Ints, keys: Keys) -> Ints:
        layout = steps.layout
        cluster = layout.labels[steps.image[captions]]
        low, high = self.start[cluster], self.start[cluster + 1]
        image = self.members[low + (keys % (high - low).astype(np.uint64)).astype(np.int64)]
        nth = (keys >> np.uint64(32)) % layout.counts[image].astype(np.uint64)
        return layout.offsets[image] + nth.astype(np.int64)
