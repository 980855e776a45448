"""Which step of an epoch each caption is in, kept up to date while captions are exchanged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hrem_layers.sampler.arrays import Bools, Ints, ragged
from hrem_layers.sampler.layout import Layout


class Assignment:
    """``order`` cut into steps by ``bounds``; what lies behind the last bound, the dropped captions, is one more step.

    Attributes:
        steps: how many, that of the dropped captions included.
        dropped: its number; -1 if nothing is dropped.
        image, step, place: (captions,) image of each caption, its step, its index in ``order``.
    """

    def __init__(self, order: Ints, bounds: Ints, layout: Layout) -> None:
        self.layout, self.order = layout, order
        self.bounds = bounds if bounds[-1] == len(order) else np.append(bounds, len(order))
        self.steps = len(self.bounds) - 1
        self.dropped = self.steps - 1 if len(self.bounds) > len(bounds) else -1
        self.image = np.repeat(np.arange(len(layout.counts)), layout.counts)
        self.step = np.empty(len(order), np.int64)
        self.step[order] = np.repeat(np.arange(self.steps), np.diff(self.bounds))
        self.place = np.empty(len(order), np.int64)
        self.place[order] = np.arange(len(order))

    def exchange(self, captions: Sequence[Ints] | Sequence[int]) -> None:
        """In place: each caption goes to where the next one is, the last to where the first is.

        Of arrays: the first of each do so, and independently the second of each, ...
        """
        moving = np.asarray(captions)
        target = np.roll(self.place[moving], -1, axis=0)
        self.step[moving] = np.roll(self.step[moving], -1, axis=0)
        self.order[target], self.place[moving] = moving, target

    def doubling(self, images: Ints) -> Ints:
        """Captions of these images whose image the same step holds already: of n in a step, n - 1."""
        counts = self.layout.counts[images]
        captions = ragged(self.layout.offsets[images], counts)
        pair = np.repeat(np.arange(len(images)) * self.steps, counts) + self.step[captions]
        by_pair = np.argsort(pair, kind="stable")
        again = captions[by_pair[1:]][pair[by_pair[1:]] == pair[by_pair[:-1]]]
        inside: Ints = again[self.step[again] != self.dropped]
        return inside

    def doubles(self, caption: int) -> bool:
        """Whether its step holds another caption of its image."""
        return int((self.steps_with(int(self.image[caption])) == self.step[caption]).sum()) > 1

    def steps_with(self, image: int) -> Ints:
        """The step of each caption of an image."""
        low, high = self.layout.offsets[image : image + 2]
        return self.step[low:high]

    def holds(self, steps: Ints, images: Ints) -> Bools:
        """Whether each step holds the image beside it."""
        counts = self.layout.counts[images]
        captions = ragged(self.layout.offsets[images], counts)
        equal = self.step[captions] == np.repeat(steps, counts)
        return np.bincount(np.repeat(np.arange(len(images)), counts)[equal], minlength=len(images)) > 0

    def images_in(self, step: int) -> Ints:
        return self.image[self.order[self.bounds[step] : self.bounds[step + 1]]]

    def steps_per_image(self, images: Ints) -> tuple[Ints, Ints]:
        """Every pair of one of these images (its index among them) and a step that holds it, once."""
        counts = self.layout.counts[images]
        steps = self.step[ragged(self.layout.offsets[images], counts)]
        pairs = np.unique(np.repeat(np.arange(len(images)), counts) * self.steps + steps)
        return pairs // self.steps, pairs % self.steps
