"""An epoch's order of captions for NeighborBatchSampler: whole-array numpy, no Python object per caption.

The order is one flat array of caption indices, cut into steps by :func:`step_bounds`. A step is the batch
of all ranks together: ``slots`` groups of ``group_size`` images, each group from one cluster. The arrangement,
for a cluster with T captions and at least ``group_size`` images:

1. *Rounds.* Its captions are dealt into rounds of equal size, an image at most once a round and each round in
   an order of its own, one round after the other: a stream in which an image comes again only after the others.
2. *Groups.* The stream is cut into groups of ``group_size``; what is left at its end is one loose piece.
3. *Spreading.* All groups, cluster after cluster, fill a table with one row a step, column by column, each column
   in random order of its rows. A cluster with g groups is so in g different steps, or, with more groups than
   steps, in every step equally often; its groups of one step are neighbours in the stream and share no image.
4. *Loose pieces.* What fits no group (the ends of the streams, and the rounds of clusters with fewer images than
   ``group_size``) keeps together, piece by piece, and fills the rows' free slots, the pieces of one cluster
   far from one another.

Only the raw output of numpy's PCG64 is used, which numpy promises never to change, and only sorts whose result
is unique; so the order is the same on every platform and with every version of numpy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hrem_layers.sampler.arrays import Draw, Ints, Keys, ragged, run_starts, sort_by


@dataclass(frozen=True)
class Layout:
    """What stays the same from epoch to epoch: the captions of each image and the cluster of each image."""

    counts: Ints  # (images,) captions of each image
    offsets: Ints  # (images + 1,) first caption of each image
    labels: Ints  # (images,) cluster of each image, 0 .. clusters - 1, none empty
    clusters: int

    @classmethod
    def build(cls, counts: Ints, cluster_ids: Ints) -> Layout:
        if cluster_ids.max() < 2 * len(cluster_ids):  # quicker than sorting
            present = np.bincount(cluster_ids) > 0
            labels, clusters = (np.cumsum(present) - 1)[cluster_ids], int(present.sum())
        else:
            names, labels = np.unique(cluster_ids, return_inverse=True)
            clusters = len(names)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(counts.astype(np.int64), offsets, labels.astype(np.int64).reshape(-1), clusters)

    @property
    def captions(self) -> int:
        return int(self.offsets[-1])

    def image_of(self, captions: npt.NDArray[Any]) -> Ints:
        return np.searchsorted(self.offsets, captions, side="right") - 1


def step_count(captions: int, step_size: int, ranks: int, drop_last: bool) -> int:
    """Steps in an epoch, see :func:`step_bounds`."""
    full, left = divmod(captions, step_size)
    if drop_last or left == 0:
        return full
    joins_last_step = full > 0 and left < ranks and step_size < 2 * ranks
    return full + (not joins_last_step)


def step_bounds(captions: int, step_size: int, ranks: int, drop_last: bool) -> Ints:
    """Where the steps begin and end in an epoch's order: (steps + 1,).

    Every step holds ``step_size`` captions. With ``drop_last=False`` the left-over captions are one more step;
    if they are fewer than the ranks, the step before it gives up as many as are missing, and if that would leave
    a rank there without any (one caption a rank), the left-over captions join that step instead.
    """
    steps = step_count(captions, step_size, ranks, drop_last)
    bounds = np.arange(steps + 1, dtype=np.int64) * step_size
    if steps and not drop_last:
        bounds[-1] = captions
        missing = ranks - int(bounds[-1] - bounds[-2])
        if steps > 1:
            bounds[-2] -= max(missing, 0)
    return bounds


def rank_bounds(bounds: Ints, step: int, ranks: int, rank: int) -> tuple[int, int]:
    """A rank's part of a step: contiguous, in rank order, sizes that differ by one at most."""
    start, size = int(bounds[step]), int(bounds[step + 1] - bounds[step])
    share, more = divmod(size, ranks)
    low = start + rank * share + min(rank, more)
    return low, low + share + (rank < more)


def arrange(layout: Layout, slots: int, group_size: int, draw: Draw) -> Ints:
    """All captions, each once: the full steps of ``slots * group_size``, then the left-over ones."""
    full, left = divmod(layout.captions, slots * group_size)
    single = _pick_captions(layout.captions, left % group_size, draw)
    captions, images, clusters, rank_in_image, kept = _deal(layout, single, draw)

    rounds = _rounds_per_cluster(layout, kept, group_size)
    too_many = rank_in_image >= rounds[clusters]
    extra = np.flatnonzero(too_many)  # captions of an image that has more than its cluster has rounds
    extra_captions, extra_images, extra_rank = captions[extra], images[extra], rank_in_image[extra]
    if len(extra):
        captions, images, clusters = captions[~too_many], images[~too_many], clusters[~too_many]

    size = np.bincount(clusters, minlength=layout.clusters)
    start = np.cumsum(size) - size
    if rounds.max(initial=0) > 1:
        turn = (np.arange(len(captions)) - start[clusters]) % rounds[clusters]
        key = (np.cumsum(rounds) - rounds)[clusters] + turn
        order = sort_by([(key, int(rounds.sum()))], draw(len(captions)))
        captions, images = captions[order], images[order]

    per_step = size // np.maximum(rounds, 1) // group_size  # groups that share no image
    groups = np.minimum(size // group_size, per_step * max(full, 1))
    slot_cluster, slot_row, free = _spread(groups, full, slots, left // group_size, draw)
    first_slot = np.cumsum(groups) - groups
    slot_start = start[slot_cluster] + group_size * (np.arange(len(slot_row)) - first_slot[slot_cluster])

    piece_cluster, piece_rank, piece_start = _loose_pieces(size, start, groups, rounds, group_size)
    new_cell = run_starts(slot_cluster, slot_row)
    cuts = np.sort(np.concatenate([slot_start[new_cell], piece_start]), kind="stable")
    _part_rounds(captions, images, cuts, size, start, np.where(groups > 0, rounds, 0))

    pieces = np.bincount(piece_cluster, minlength=layout.clusters)
    when = np.concatenate([
        _times(piece_rank, pieces[piece_cluster], len(free), draw(len(pieces))[piece_cluster], draw),
        _times(extra_rank, kept[extra_images], len(free), draw(len(extra)), draw),
    ])  # fmt: skip
    ends = np.append(cuts, len(captions))
    piece_end = np.append(ends[np.searchsorted(cuts, piece_start) + 1], len(captions) + np.arange(len(extra)) + 1)
    piece_start = np.append(piece_start, len(captions) + np.arange(len(extra)))
    by_time = sort_by([], when)
    in_pieces = ragged(piece_start[by_time], (piece_end - piece_start)[by_time])

    in_groups = slot_start[:, None] + np.arange(group_size)
    blocks = np.append(captions, extra_captions)[np.concatenate([in_groups, in_pieces.reshape(-1, group_size)])]
    order = _order_blocks(slot_row, new_cell, np.repeat(np.arange(len(free)), free), draw)
    return np.append(blocks[order], single)


def _pick_captions(captions: int, number: int, draw: Draw) -> Ints:
    """What is too little for a group, chosen evenly among all captions so that none is always the one left over."""
    picked: dict[int, None] = {}
    while len(picked) < number:
        caption = captions - 1 - int(draw(1)[0]) % captions  # without shuffling: the last ones
        while caption in picked:
            caption = (caption - 1) % captions
        picked[caption] = None
    return np.fromiter(picked, np.int64, len(picked))


def _deal(layout: Layout, single: Ints, draw: Draw) -> tuple[Ints, Ints, Ints, Ints, Ints]:
    """The captions cluster by cluster, in it image by image, both shuffled; without those in ``single``.

    Returns captions, their images, their clusters, their number within the image, and the captions of each image.
    """
    images = sort_by([(layout.labels, layout.clusters)], draw(len(layout.labels)))
    captions = ragged(layout.offsets[images], layout.counts[images])
    kept = layout.counts
    if len(single):
        taken = np.zeros(layout.captions, bool)
        taken[single] = True
        captions = captions[~taken[captions]]
        kept = layout.counts - np.bincount(layout.image_of(single), minlength=len(kept))
    count = kept[images]
    rank = ragged(np.zeros(len(images), np.int64), count)
    if kept.max() > 1:
        place = np.repeat(np.arange(len(images)), count)
        captions = captions[sort_by([(place, len(images))], draw(len(captions)))]
    owner = np.repeat(images, count)
    return captions, owner, layout.labels[owner], rank, kept


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


def _spread(groups: Ints, full: int, slots: int, short: int, draw: Draw) -> tuple[Ints, Ints, Ints]:
    """Place each cluster's groups in ``full`` rows of ``slots`` slots and a last one of ``short``.

    Returns cluster and row of each group, sorted, and the free slots of each row.
    """
    total, rows = int(groups.sum()), full + (short > 0)
    free = np.array([slots] * full + [short] * (short > 0), np.int64)
    # The last row's share, rounded at random so that it takes its part of groups and of loose pieces alike.
    capacity = max(full * slots + short, 1)
    in_last = (total * short + int(draw(1)[0]) % capacity) // capacity
    deep, odd = divmod(total - in_last, full) if full else (0, 0)
    # Columns that not all rows reach come first: the cluster that runs on from one finds its free rows in the next.
    partly = max(in_last - deep, 0)
    deeper = sort_by([], draw(full))[:odd]
    columns = [deeper] if odd and not partly else []
    columns += [np.append(deeper, full)] * partly
    columns += [np.arange(full + (column < in_last - partly)) for column in range(deep)]

    order = sort_by([], draw(len(groups)))
    cluster = np.repeat(order, groups[order])
    row = np.empty(total, np.int64)
    keys = draw(total)
    ends = np.cumsum(groups[order])
    used = np.zeros(rows, np.int64)  # how often the cluster that runs on from the column before is in each row
    chosen = np.zeros(rows, bool)
    at, carried = 0, -1
    for column_rows in columns:
        stop = at + len(column_rows)
        shuffled = column_rows[sort_by([], keys[at:stop])]
        if carried >= 0:
            head = min(int(ends[carried]), stop) - at
            first = shuffled[np.argsort(used[shuffled], kind="stable")[:head]]
            chosen[first] = True
            shuffled = np.concatenate([first, shuffled[~chosen[shuffled]]])
            chosen[first] = False
        row[at:stop] = shuffled
        last = int(np.searchsorted(ends, stop - 1, side="right"))  # the cluster in the column's last slot
        runs_on = ends[last] > stop
        if last != carried:
            used[:] = 0
        if runs_on:
            begin = int(ends[last - 1]) if last else 0
            used[row[max(begin, at) : stop]] += 1
        at, carried = stop, last if runs_on else -1
    by_row = sort_by([(cluster, len(groups)), (row, rows)])
    return cluster[by_row], row[by_row], free - np.bincount(row, minlength=rows)


def _loose_pieces(size: Ints, start: Ints, groups: Ints, rounds: Ints, group_size: int) -> tuple[Ints, Ints, Ints]:
    """What is in no group: cluster, number within the cluster, and start in the stream of each piece."""
    rest = size - groups * group_size
    pieces = np.where(groups > 0, -(-rest // group_size), rounds)
    cluster = np.repeat(np.arange(len(size)), pieces)
    rank = ragged(np.zeros(len(size), np.int64), pieces)
    low, more = np.divmod(size, np.maximum(rounds, 1))  # sizes of the rounds: `more` of them have one more
    in_rounds = rank * low[cluster] + np.minimum(rank, more[cluster])
    begin = np.where(groups[cluster] > 0, (groups[cluster] + rank) * group_size, in_rounds)
    return cluster, rank, start[cluster] + begin


def _part_rounds(captions: Ints, images: Ints, cuts: Ints, size: Ints, start: Ints, rounds: Ints) -> None:
    """In place: a run between two cuts that reaches over the end of a round gets no image twice.

    The images that such a run took from the old round, and would take again from the new one, change places within
    the new round with the first ones behind the run that it does not hold. There are enough of those, because a
    run is no longer than a round.
    """
    low, more = np.divmod(size, np.maximum(rounds, 1))
    seen = np.zeros(int(images.max(initial=-1)) + 1, np.int64)
    for turn in range(1, int(rounds.max(initial=0))):
        cluster = np.flatnonzero(rounds > turn)
        begin = start[cluster] + turn * low[cluster] + np.minimum(turn, more[cluster])
        end = begin + low[cluster] + (turn < more[cluster])
        run = np.searchsorted(cuts, begin, side="right")
        run_start, run_end = cuts[run - 1], np.append(cuts, len(captions))[run]
        across = run_start < begin
        begin, end, run_start, run_end = begin[across], end[across], run_start[across], run_end[across]
        run_end = np.minimum(run_end, end)
        seen[images[ragged(run_start, begin - run_start)]] = turn
        behind_end = np.minimum(run_end + (begin - run_start), end)
        head, behind = ragged(begin, run_end - begin), ragged(run_end, behind_end - run_end)
        again = seen[images[head]] == turn
        fresh = seen[images[behind]] != turn
        owner = np.arange(len(begin))
        twice = np.bincount(np.repeat(owner, run_end - begin)[again], minlength=len(begin))
        behind_owner = np.repeat(owner, behind_end - run_end)[fresh]
        have = np.bincount(behind_owner, minlength=len(begin))
        place = np.arange(len(behind_owner)) - (np.cumsum(have) - have)[behind_owner]
        here, there = head[again], behind[fresh][place < twice[behind_owner]]
        for stream in (captions, images):
            stream[here], stream[there] = stream[there], stream[here]


def _times(rank: Ints, pieces: Ints, rows: int, phase: Keys, draw: Draw) -> Keys:
    """When in the epoch each loose piece comes: the k-th of p in the k-th p-th of it, as random as keeps two pieces
    of one cluster at least a row apart."""
    free = np.clip(1 - 1.1 * pieces / max(rows, 1), 0, 1)
    at = rank + (1 - free) * (phase / 2.0**64) + free * (draw(len(rank)) / 2.0**64)
    return (np.minimum(at / pieces, 1 - 2**-53) * 2.0**64).astype(np.uint64)


def _order_blocks(slot_row: Ints, new_cell: npt.NDArray[np.bool_], loose_row: Ints, draw: Draw) -> Ints:
    """Row by row, in it at random; several groups of one cluster far apart, so that they fall to different ranks."""
    row = np.concatenate([slot_row, loose_row])
    rows, keys = int(row.max(initial=-1)) + 1, draw(len(row))
    if new_cell.all():
        return sort_by([(row, rows)], keys)
    cell = np.cumsum(new_cell) - 1
    count = np.bincount(cell)
    nth = np.arange(len(cell)) - np.flatnonzero(new_cell)[cell]
    most = int(count.max())
    nth = np.append(nth, np.zeros(len(loose_row), np.int64))
    fewer = most - np.append(count[cell], np.ones(len(loose_row), np.int64))
    keys[: len(cell)] = keys[np.flatnonzero(new_cell)][cell]  # equal in a cell: the same order at every turn
    return sort_by([(row, rows), (nth, most), (fewer, most)], keys)
