"""The shortest chain of steps along which captions can be exchanged, so that one image less is doubled.

Caption c doubles its image in step X. A chain X, Y, ..., Z: X gives c to Y, which lacks that image, Y gives a caption
to the next step, which lacks its image, ..., and Z gives X one that X gains by taking. These are the augmenting paths
of a flow from images to steps: where there is none, no arrangement with these sizes doubles less.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from hrem_layers.sampler.arrays import Bools, Ints
from hrem_layers.sampler.assignment import Assignment


def exchange_along_paths(steps: Assignment, images: Ints) -> bool:
    """Try every caption that doubles one of these images, which must be all that are doubled; True if one was moved,
    so that it is worth another pass."""
    moved = False
    pending = steps.doubling(images)
    while len(pending):
        caption, pending = int(pending[0]), pending[1:]
        if not steps.doubles(caption):  # not any more
            continue
        path, reached = _shortest_path(steps, caption, images)
        if path:
            steps.exchange([caption, *path])
            moved = True
        else:
            pending = pending[~_leads_into(steps, reached, pending, int(steps.step[caption]))]
    return moved


def _shortest_path(steps: Assignment, caption: int, images: Ints) -> tuple[list[int], Bools]:
    """The captions to exchange with this one, one after the other, by breadth-first search over the steps.

    Empty if there is none; and the steps reached, out of which no other caption finds a way to this step either.
    """
    start = int(steps.step[caption])
    lacking = np.ones(steps.steps, bool)
    lacking[steps.steps_with(int(steps.image[caption]))] = False
    if steps.dropped >= 0:
        lacking[steps.dropped] = True  # so that it is never reached over another step
    came = dict.fromkeys(np.flatnonzero(lacking).tolist(), -1)  # from which step each one was reached
    reached = lacking.copy()
    reached[start] = True
    if not came:
        return [], reached

    useful = _worth_taking(steps, start, images)
    gives = np.logical_or.reduceat(useful, steps.bounds[:-1])
    queue = deque(came)
    end = next((step for step in queue if gives[step]), -1)
    while queue and end < 0:
        step = queue.popleft()
        new = np.flatnonzero(_may_take_from(steps, step) & ~reached).tolist()
        came.update(dict.fromkeys(new, step))
        queue.extend(new)
        reached[new] = True
        end = next((step for step in new if gives[step]), -1)
    if end < 0:
        return [], reached

    low, high = steps.bounds[end], steps.bounds[end + 1]
    backwards = [int(steps.order[low + int(np.argmax(useful[low:high]))])]
    while came[end] >= 0:
        backwards.append(_gift(steps, came[end], end))
        end = came[end]
    return backwards[::-1], reached


def _worth_taking(steps: Assignment, taker: int, doubled: Ints) -> Bools:
    """Places whose caption ``taker`` gains by taking, or another step gains by giving."""
    inside = np.zeros(len(steps.layout.counts), bool)
    inside[steps.images_in(taker)] = True
    places = ~inside[steps.image[steps.order]]
    places[steps.place[steps.doubling(doubled)]] = True
    return places


def _may_take_from(steps: Assignment, giver: int) -> Bools:
    """Steps that lack an image of ``giver``."""
    images = np.unique(steps.images_in(giver))
    _, holding = steps.steps_per_image(images)
    return np.bincount(holding, minlength=steps.steps) < len(images)


def _gift(steps: Assignment, giver: int, taker: int) -> int:
    """The first caption of ``giver`` whose image ``taker`` lacks."""
    places = np.arange(steps.bounds[giver], steps.bounds[giver + 1])
    return int(steps.order[places[~np.isin(steps.images_in(giver), steps.images_in(taker))][0]])


def _leads_into(steps: Assignment, dead_end: Bools, captions: Ints, step: int) -> Bools:
    """Which of these captions are in ``step`` and could move to steps of ``dead_end`` only."""
    live = ~dead_end
    here = np.flatnonzero(steps.step[captions] == step)
    images, which = np.unique(steps.image[captions[here]], return_inverse=True)
    image, holding = steps.steps_per_image(images)
    held = np.bincount(image[live[holding]], minlength=len(images))
    into = np.zeros(len(captions), bool)
    into[here] = (held == live.sum())[which]
    return into
