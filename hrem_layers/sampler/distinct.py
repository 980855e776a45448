"""No step of an epoch holds two captions of one image where that can be avoided.

:func:`hrem_layers.sampler.batching.arrange` leaves almost none; what is left is mended by exchanging captions between
steps. A caption that doubles an image in step X goes to a step Y without that image, and Y gives one to X. First
by trial, many at a time; then, where none is found so, along the shortest chain of steps (Y gives to Z, Z to X):
the augmenting paths of a flow from images to steps, so that what then remains cannot be avoided. The sizes of the
steps stay. Dropped captions are one more step, of which nothing is asked.
"""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from hrem_layers.sampler.arrays import Draw, Ints, ragged, sort_by
from hrem_layers.sampler.batching import Layout

Mask = npt.NDArray[np.bool_]
_TRIALS = "cccccccc" + "aaaa" + "dddda" * 20  # partner: of the same cluster, any, or another caption that doubles
_PATIENCE = 10  # trials in a row without an exchange


def keep_distinct(order: Ints, bounds: Ints, layout: Layout, draw: Draw) -> None:
    """Exchange captions in ``order`` (in place) between the steps that ``bounds`` cuts; what lies behind the last
    bound is dropped."""
    images = _doubled_images(order, bounds, layout)
    if not len(images):
        return
    steps = _Steps(order, bounds, layout)
    idle = 0
    for partner in _TRIALS:
        captions = steps.doubling(images)
        if not len(captions):
            return
        idle = 0 if steps.exchange(captions, steps.partners(partner, captions, draw)) else idle + 1
        if idle == _PATIENCE:
            break
    while _exchange_along_paths(steps, images):
        pass


def _exchange_along_paths(steps: _Steps, images: Ints) -> bool:
    """Try every caption that still doubles; True if one was moved, so that it is worth another pass."""
    moved = False
    pending = steps.doubling(images, all_of_them=True)
    while len(pending):
        caption, pending = int(pending[0]), pending[1:]
        if not steps.doubles(caption):  # not any more
            continue
        path, dead_end = steps.path_for(caption, images)
        if path:
            steps.rotate(path)
            moved = True
        else:
            pending = pending[~steps.leads_into(dead_end, pending, int(steps.step[caption]))]
    return moved


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


class _Steps:
    """The steps and where each caption is, kept up to date through exchanges."""

    def __init__(self, order: Ints, bounds: Ints, layout: Layout) -> None:
        self.layout, self.order = layout, order
        self.bounds = bounds if bounds[-1] == len(order) else np.append(bounds, len(order))
        self.number = len(self.bounds) - 1
        self.dropped = self.number - 1 if len(self.bounds) > len(bounds) else -1
        self.image = np.repeat(np.arange(len(layout.counts)), layout.counts)  # of each caption
        self.step = np.empty(len(order), np.int64)  # of each caption
        self.step[order] = np.repeat(np.arange(self.number), np.diff(self.bounds))
        self.place = np.empty(len(order), np.int64)  # of each caption
        self.place[order] = np.arange(len(order))
        by_cluster = sort_by([(layout.labels, layout.clusters)])
        self.members = by_cluster[layout.counts[by_cluster] > 0]
        self.member_start = np.searchsorted(layout.labels[self.members], np.arange(layout.clusters + 1))

    def doubling(self, images: Ints, *, all_of_them: bool = False) -> Ints:
        """Of these images, the captions whose image the same step holds already; one an image, or all."""
        counts = self.layout.counts[images]
        captions = ragged(self.layout.offsets[images], counts)
        pair = np.repeat(np.arange(len(images)) * self.number, counts) + self.step[captions]
        by_pair = np.argsort(pair, kind="stable")
        again = captions[by_pair[1:]][pair[by_pair[1:]] == pair[by_pair[:-1]]]
        again = again[self.step[again] != self.dropped]
        if all_of_them:
            return again
        return again[np.unique(self.image[again], return_index=True)[1]]

    def partners(self, kind: str, captions: Ints, draw: Draw) -> Ints:
        keys = draw(len(captions))
        if kind == "d":
            return captions[sort_by([], keys)]
        if kind == "a":
            return (keys % np.uint64(len(self.order))).astype(np.int64)
        low, high = (self.member_start[self.layout.labels[self.image[captions]] + end] for end in (0, 1))
        other = self.members[low + (keys % (high - low).astype(np.uint64)).astype(np.int64)]
        within = (keys >> np.uint64(32)) % self.layout.counts[other].astype(np.uint64)
        return self.layout.offsets[other] + within.astype(np.int64)

    def exchange(self, ours: Ints, theirs: Ints) -> int:
        """Exchange those pairs that suit both steps; an image takes part once at most, so that none spoils another.

        Returns how many.
        """
        mine, other = self.image[ours], self.image[theirs]
        suits = ~self._holds(self.step[ours], other)
        suits &= (self.step[theirs] == self.dropped) | ~self._holds(self.step[theirs], mine)
        ours, theirs = ours[suits], theirs[suits]
        both = np.stack([self.image[ours], self.image[theirs]], 1).reshape(-1)
        first = np.zeros(len(both), bool)
        first[np.unique(both, return_index=True)[1]] = True
        single = first.reshape(-1, 2).all(1)
        self.rotate([ours[single], theirs[single]])
        return int(single.sum())

    def _holds(self, steps: Ints, images: Ints) -> Mask:
        counts = self.layout.counts[images]
        captions = ragged(self.layout.offsets[images], counts)
        equal = self.step[captions] == np.repeat(steps, counts)
        return np.bincount(np.repeat(np.arange(len(images)), counts)[equal], minlength=len(images)) > 0

    def rotate(self, captions: list[Ints] | list[int]) -> None:
        """Each caption goes to the place of the next one, the last to that of the first."""
        moving = np.asarray(captions)
        target = np.roll(self.place[moving], -1, axis=0)
        self.step[moving] = np.roll(self.step[moving], -1, axis=0)
        self.order[target], self.place[moving] = moving, target

    def doubles(self, caption: int) -> bool:
        image = self.image[caption]
        others = self.step[self.layout.offsets[image] : self.layout.offsets[image + 1]]
        return int((others == self.step[caption]).sum()) > 1

    def path_for(self, caption: int, images: Ints) -> tuple[list[int], Mask]:
        """Shortest cycle of captions to exchange, by breadth-first search over the steps.

        Empty if there is none; and the steps reached, out of which no other caption finds a way to this step either.
        """
        start, image = int(self.step[caption]), int(self.image[caption])
        reached = np.ones(self.number, bool)
        reached[self.step[self.layout.offsets[image] : self.layout.offsets[image + 1]]] = False
        if self.dropped >= 0:
            reached[self.dropped] = True
        came: dict[int, int] = dict.fromkeys(np.flatnonzero(reached).tolist(), -1)
        queue = deque(came)
        reached[start] = True
        useful = self._worth_taking(start, images) if came else np.zeros(len(self.order), bool)  # places
        gives = np.logical_or.reduceat(useful, self.bounds[:-1])
        end = next((step for step in queue if gives[step]), -1)
        while queue and end < 0:
            step = queue.popleft()
            new = np.flatnonzero(self._may_take_from(step) & ~reached).tolist()
            came.update(dict.fromkeys(new, step))
            queue.extend(new)
            reached[new] = True
            end = next((step for step in new if gives[step]), -1)
        if end < 0:
            return [], reached
        low, high = self.bounds[end], self.bounds[end + 1]
        path = [int(self.order[low + int(np.argmax(useful[low:high]))])]
        while came[end] >= 0:
            path.append(self._gift(came[end], end))
            end = came[end]
        return [caption, *reversed(path)], reached

    def leads_into(self, dead_end: Mask, captions: Ints, step: int) -> Mask:
        """Which captions of ``step`` could move to steps of ``dead_end`` only."""
        live = ~dead_end
        here = np.flatnonzero(self.step[captions] == step)
        images, which = np.unique(self.image[captions[here]], return_inverse=True)
        counts = self.layout.counts[images]
        steps = self.step[ragged(self.layout.offsets[images], counts)]
        pairs = np.unique((np.repeat(np.arange(len(images)), counts) * self.number + steps)[live[steps]])
        held = np.bincount(pairs // self.number, minlength=len(images))
        into = np.zeros(len(captions), bool)
        into[here] = (held == live.sum())[which]
        return into

    def _images_in(self, step: int) -> Ints:
        return self.image[self.order[self.bounds[step] : self.bounds[step + 1]]]

    def _worth_taking(self, step: int, doubled: Ints) -> Mask:
        """Places whose caption ``step`` gains by taking, or another step gains by giving."""
        inside = np.zeros(len(self.layout.counts), bool)
        inside[self._images_in(step)] = True
        places = ~inside[self.image[self.order]]
        places[self.place[self.doubling(doubled, all_of_them=True)]] = True
        return places

    def _may_take_from(self, step: int) -> Mask:
        """Steps that lack an image of ``step``."""
        images = np.unique(self._images_in(step))
        counts = self.layout.counts[images]
        captions = ragged(self.layout.offsets[images], counts)
        pairs = np.unique(np.repeat(np.arange(len(images)), counts) * self.number + self.step[captions])
        lacks = np.bincount(pairs % self.number, minlength=self.number) < len(images)
        if self.dropped >= 0:
            lacks[self.dropped] = True
        return lacks

    def _gift(self, giver: int, taker: int) -> int:
        places = np.arange(self.bounds[giver], self.bounds[giver + 1])
        if taker != self.dropped:
            places = places[~np.isin(self._images_in(giver), self._images_in(taker))]
        return int(self.order[places[0]])
