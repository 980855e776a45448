"""The captions of each cluster as a stream of rounds, in which an image comes again only after the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hrem_layers.sampler.arrays import Bools, Draw, Ints, ragged, sort_by
from hrem_layers.sampler.layout import Layout


@dataclass(frozen=True)
class Streams:
    """The clusters' streams, one after the other; each is its rounds, one after the other."""

    captions: Ints  # (captions,)
    images: Ints  # (captions,) image of each
    sizes: Ints  # (clusters,) captions of each cluster
    rounds: Ints  # (clusters,) rounds of each cluster

    @property
    def starts(self) -> Ints:
        return np.cumsum(self.sizes) - self.sizes

    def round_starts(self, clusters: Ints, nth: Ints | int) -> Ints:
        """Where the nth round of each of these clusters begins: their sizes differ by one at most, large ones first."""
        sizes, rounds = self.sizes[clusters], np.maximum(self.rounds[clusters], 1)
        return self.starts[clusters] + nth * (sizes // rounds) + np.minimum(nth, sizes % rounds)


@dataclass(frozen=True)
class Extra:
    """The captions that are in no stream: those of an image that has more than its cluster has rounds."""

    captions: Ints
    nth: Ints  # number of each within its image
    of: Ints  # captions of that image


def deal(layout: Layout, single: Ints, group_size: int, draw: Draw) -> tuple[Streams, Extra]:
    """Deal all captions but those in ``single`` into rounds, an image at most once per round.

    Laid out image by image, the captions of a cluster go to its rounds in turn; those of one image follow each
    other and are no more than the rounds, so that they go to different ones.
    """
    kept = layout.counts - np.bincount(layout.image_of(single), minlength=len(layout.counts))
    captions, images, nth = _image_by_image(layout, single, kept, draw)
    clusters = layout.labels[images]
    rounds = _rounds_per_cluster(layout, kept, group_size)

    too_many = nth >= rounds[clusters]
    extra = Extra(captions[too_many], nth[too_many], kept[images[too_many]])
    if len(extra.captions):
        captions, images, clusters = captions[~too_many], images[~too_many], clusters[~too_many]

    sizes = np.bincount(clusters, minlength=layout.clusters)
    if rounds.max(initial=0) > 1:
        turn = (np.arange(len(captions)) - (np.cumsum(sizes) - sizes)[clusters]) % rounds[clusters]
        round_number = (np.cumsum(rounds) - rounds)[clusters] + turn  # over all clusters
        order = sort_by([(round_number, int(rounds.sum()))], draw(len(captions)))
        captions, images = captions[order], images[order]
    return Streams(captions, images, sizes, rounds), extra


def _image_by_image(layout: Layout, single: Ints, kept: Ints, draw: Draw) -> tuple[Ints, Ints, Ints]:
    """The captions cluster by cluster, in it image by image, both shuffled; without those in ``single``.

    Returns captions, their images, and their number within the image.
    """
    images = sort_by([(layout.labels, layout.clusters)], draw(len(layout.labels)))
    captions = ragged(layout.offsets[images], layout.counts[images])
    if len(single):
        taken = np.zeros(layout.captions, bool)
        taken[single] = True
        captions = captions[~taken[captions]]
    counts = kept[images]
    if kept.max() > 1:
        place = np.repeat(np.arange(len(images)), counts)
        captions = captions[sort_by([(place, len(images))], draw(len(captions)))]
    return captions, np.repeat(images, counts), ragged(np.zeros(len(images), np.int64), counts)


def _rounds_per_cluster(layout: Layout, kept: Ints, group_size: int) -> Ints:
    """Rounds to deal a cluster's captions into: as many as its richest image has captions, but no more than leaves
    every round at least ``group_size`` images, where the cluster has that many at all."""
    rounds = np.zeros(layout.clusters, np.int64)
    np.maximum.at(rounds, layout.labels, kept)

    def dealt(limit: Ints) -> Ints:  # captions that fit into `limit` rounds
        fit = np.minimum(kept, limit[layout.labels])
        return np.bincount(layout.labels, weights=fit, minlength=layout.clusters).astype(np.int64)

    low, high = np.ones_like(rounds), rounds.copy()
    uneven = (dealt(low) >= group_size) & (dealt(high) < group_size * high)
    while (search := uneven & (high - low > 1)).any():
        middle = np.where(search, (low + high) // 2, low)
        enough = dealt(middle) >= group_size * middle
        low, high = np.where(search & enough, middle, low), np.where(search & ~enough, middle, high)
    return np.where(uneven, low, rounds)


def part_rounds(streams: Streams, cuts: Ints, clusters: Ints) -> None:
    """In place: a run between two cuts that reaches over the end of a round of these clusters gets no image twice.

    The images that such a run took from the old round, and would take again from the new one, change places within
    the new round with the first ones behind the run that it does not hold. There are enough of those, because a
    run is no longer than a round.
    """
    captions, images = streams.captions, streams.images
    seen = np.zeros(int(images.max(initial=-1)) + 1, np.int64)
    for nth in range(1, int(streams.rounds[clusters].max(initial=0))):
        having = clusters[streams.rounds[clusters] > nth]
        begin, end = streams.round_starts(having, nth), streams.round_starts(having, nth + 1)
        run = np.searchsorted(cuts, begin, side="right")
        run_start, run_end = cuts[run - 1], np.append(cuts, len(captions))[run]
        across = run_start < begin
        begin, end, run_start, run_end = begin[across], end[across], run_start[across], run_end[across]
        run_end = np.minimum(run_end, end)
        seen[images[ragged(run_start, begin - run_start)]] = nth
        behind_end = np.minimum(run_end + (begin - run_start), end)
        head, behind = ragged(begin, run_end - begin), ragged(run_end, behind_end - run_end)
        again, fresh = seen[images[head]] == nth, seen[images[behind]] != nth
        of_run = np.arange(len(begin))
        needed = np.bincount(np.repeat(of_run, run_end - begin)[again], minlength=len(begin))
        chosen = _first_of_each(np.repeat(of_run, behind_end - run_end)[fresh], needed)
        here, there = head[again], behind[fresh][chosen]
        for stream in (captions, images):
            stream[here], stream[there] = stream[there], stream[here]


def _first_of_each(owner: Ints, needed: Ints) -> Bools:
    """True for the first ``needed[i]`` places of owner i; ``owner`` ascends."""
    offered = np.bincount(owner, minlength=len(needed))
    nth = np.arange(len(owner)) - (np.cumsum(offered) - offered)[owner]
    return nth < needed[owner]
