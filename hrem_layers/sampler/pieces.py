"""What fits no group of its cluster: loose pieces, spread over the epoch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hrem_layers.sampler.arrays import Draw, Ints, Keys, ragged, sort_by
from hrem_layers.sampler.streams import Extra, Streams


@dataclass(frozen=True)
class Pieces:
    """Runs of the streams that keep together; each ends where the next group or piece begins."""

    start: Ints  # (pieces,) in the streams
    nth: Ints  # (pieces,) number of each within its cluster
    cluster: Ints  # (pieces,)
    per_cluster: Ints  # (clusters,) number of pieces


def loose_pieces(streams: Streams, groups: Ints, group_size: int) -> Pieces:
    """The ends of the streams behind their groups, in pieces of ``group_size``; of a stream without any, its rounds."""
    has_groups = groups > 0
    rest = streams.sizes - groups * group_size
    per_cluster = np.where(has_groups, -(-rest // group_size), streams.rounds)
    cluster = np.repeat(np.arange(len(groups)), per_cluster)
    nth = ragged(np.zeros(len(groups), np.int64), per_cluster)
    behind_groups = streams.starts[cluster] + (groups[cluster] + nth) * group_size
    start = np.where(has_groups[cluster], behind_groups, streams.round_starts(cluster, nth))
    return Pieces(start, nth, cluster, per_cluster)


def one_after_the_other(pieces: Pieces, extra: Extra, cuts: Ints, dealt: int, rows: int, draw: Draw) -> Ints:
    """The loose captions, piece by piece in the order in which they come in the epoch.

    As indices of the ``dealt`` captions of the streams, with the extra ones, each a piece by itself, behind them.
    """
    phase = draw(len(pieces.per_cluster))[pieces.cluster]
    time = np.concatenate([
        _times(pieces.nth, pieces.per_cluster[pieces.cluster], rows, phase, draw),
        _times(extra.nth, extra.of, rows, draw(len(extra.captions)), draw),
    ])  # fmt: skip
    behind = dealt + np.arange(len(extra.captions))
    start = np.append(pieces.start, behind)
    ends = np.append(cuts, dealt)
    end = np.append(ends[np.searchsorted(cuts, pieces.start) + 1], behind + 1)
    by_time = sort_by([], time)
    return ragged(start[by_time], (end - start)[by_time])


def _times(nth: Ints, of: Ints, rows: int, phase: Keys, draw: Draw) -> Keys:
    """When in the epoch each loose piece comes: the k-th of p in the k-th p-th of it, as random as keeps two pieces
    of one cluster at least a row apart: all move by the same ``phase``, and each by as much as there is room for."""
    free = np.clip(1 - 1.1 * of / max(rows, 1), 0, 1)
    at = nth + (1 - free) * (phase / 2.0**64) + free * (draw(len(nth)) / 2.0**64)
    return (np.minimum(at / of, 1 - 2**-53) * 2.0**64).astype(np.uint64)
