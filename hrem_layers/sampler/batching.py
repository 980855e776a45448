"""An epoch's order of captions for NeighborBatchSampler: whole-array numpy, no Python object per caption.

The order is one flat array of caption indices, cut into steps by :func:`hrem_layers.sampler.epoch.step_bounds`. A step
is the batch of all ranks together: ``slots`` groups of ``group_size`` images, each group from one cluster. The
arrangement, for a cluster with T captions and at least ``group_size`` images:

1. *Rounds* (``streams.py``). Its captions are dealt into rounds of equal size, an image at most once per round and each
   round in an order of its own, one round after the other: a stream in which an image comes again only after the
   others.
2. *Groups*. The stream is cut into groups of ``group_size``; what is left at its end is loose.
3. *Spreading* (``spread.py``). All groups, cluster after cluster, fill a table with one row per step, column by column,
   each column in random order of its rows. A cluster with g groups is so in g different steps, or, with more groups
   than steps, in every step equally often; its groups of one step are neighbours in the stream and share no image.
4. *Loose pieces* (``pieces.py``). What fits no group (the ends of the streams, and the rounds of clusters with fewer
   images than ``group_size``) keeps together, piece by piece, and fills the rows' free slots, the pieces of one cluster
   far from one another.
5. *Blocks*. Groups, and loose captions ``group_size`` at a time, are the blocks that fill a row, in random order.

Only the raw output of numpy's PCG64 is used, which numpy promises never to change, and only sorts whose result
is unique; so the order is the same on every platform and with every version of numpy.
"""

from __future__ import annotations

import numpy as np

from hrem_layers.sampler.arrays import Bools, Draw, Ints, run_starts, sort_by
from hrem_layers.sampler.layout import Layout
from hrem_layers.sampler.pieces import loose_pieces, one_after_the_other
from hrem_layers.sampler.spread import Table, spread
from hrem_layers.sampler.streams import Streams, deal, part_rounds


def arrange(layout: Layout, slots: int, group_size: int, draw: Draw) -> Ints:
    """All captions, each once: the full steps of ``slots * group_size``, then the left-over ones."""
    full, left = divmod(layout.captions, slots * group_size)
    table = Table(full, slots, left // group_size)
    single = _pick_captions(layout.captions, left % group_size, draw)
    streams, extra = deal(layout, single, group_size, draw)

    groups = _groups_per_cluster(streams, group_size, full)
    cluster, row = spread(groups, table, draw)
    start = _group_starts(streams, groups, cluster, group_size)
    first_in_row = run_starts(cluster, row)  # of the groups of one cluster in one row

    pieces = loose_pieces(streams, groups, group_size)
    cuts = np.sort(np.concatenate([start[first_in_row], pieces.start]), kind="stable")
    part_rounds(streams, cuts, np.flatnonzero(groups))

    in_groups = start[:, None] + np.arange(group_size)
    in_pieces = one_after_the_other(pieces, extra, cuts, len(streams.captions), table.rows, draw)
    blocks = np.concatenate([in_groups, in_pieces.reshape(-1, group_size)])
    loose_row = np.repeat(np.arange(table.rows), table.free(row))
    by_row = _order_blocks(row, first_in_row, loose_row, draw)
    captions = np.append(streams.captions, extra.captions)
    return np.append(captions[blocks[by_row]], single)


def _pick_captions(captions: int, number: int, draw: Draw) -> Ints:
    """What is too little for a group, chosen evenly among all captions so that none is always the one left over."""
    picked: dict[int, None] = {}
    while len(picked) < number:
        caption = captions - 1 - int(draw(1)[0]) % captions  # without shuffling: the last ones
        while caption in picked:
            caption = (caption - 1) % captions
        picked[caption] = None
    return np.fromiter(picked, np.int64, len(picked))


def _groups_per_cluster(streams: Streams, group_size: int, full: int) -> Ints:
    """As many as the stream holds, but no more than ``full`` rows (or the one) take without an image twice."""
    in_a_round = streams.sizes // np.maximum(streams.rounds, 1) // group_size
    return np.minimum(streams.sizes // group_size, in_a_round * max(full, 1))


def _group_starts(streams: Streams, groups: Ints, cluster: Ints, group_size: int) -> Ints:
    """Where each group begins in the streams; ``cluster`` says of which stream it is, in ascending order."""
    first = np.cumsum(groups) - groups
    start: Ints = streams.starts[cluster] + group_size * (np.arange(len(cluster)) - first[cluster])
    return start


def _order_blocks(group_row: Ints, first_in_row: Bools, loose_row: Ints, draw: Draw) -> Ints:
    """Row by row, in it at random; several groups of one cluster far apart, so that they fall to different ranks:
    first every cluster's first group of the row, then every cluster's second, clusters always in the same order."""
    row = np.concatenate([group_row, loose_row])
    rows, keys = int(row.max(initial=-1)) + 1, draw(len(row))
    if first_in_row.all():
        return sort_by([(row, rows)], keys)
    first = np.flatnonzero(first_in_row)
    run = np.cumsum(first_in_row) - 1
    count = np.bincount(run)
    most = int(count.max())
    nth = np.arange(len(run)) - first[run]
    fewer = most - count[run]
    alone = np.zeros_like(loose_row)
    keys[: len(run)] = keys[first][run]
    return sort_by([(row, rows), (np.append(nth, alone), most), (np.append(fewer, alone + most - 1), most)], keys)
