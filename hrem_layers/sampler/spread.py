"""Which step each group of a cluster comes in: a table with a row per step, filled column by column."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hrem_layers.sampler.arrays import Draw, Ints, Keys, sort_by


@dataclass(frozen=True)
class Table:
    """``full`` rows of ``slots`` slots, and, unless ``short`` is 0, a last row of ``short``."""

    full: int
    slots: int
    short: int

    @property
    def rows(self) -> int:
        return self.full + (self.short > 0)

    @property
    def capacity(self) -> int:
        return self.full * self.slots + self.short

    def free(self, taken: Ints) -> Ints:
        """Slots left in each row, where a slot is taken in each of the rows ``taken``."""
        slots = np.array([self.slots] * self.full + [self.short] * (self.short > 0), np.int64)
        return slots - np.bincount(taken, minlength=self.rows)


def spread(groups: Ints, table: Table, draw: Draw) -> tuple[Ints, Ints]:
    """Place so many groups of each cluster, clusters in random order: cluster and row of each, sorted by both.

    A cluster with no more groups than a column has rows is in a row once at most, a larger one in all of them equally
    often.
    """
    columns = _columns(int(groups.sum()), table, draw)
    order = sort_by([], draw(len(groups)))
    cluster = np.repeat(order, groups[order])
    row = _fill(columns, groups[order], table.rows, draw(len(cluster)))
    by_row = sort_by([(cluster, len(groups)), (row, table.rows)])
    return cluster[by_row], row[by_row]


def _columns(total: int, table: Table, draw: Draw) -> list[Ints]:
    """The rows that each column reaches, so that there are ``total`` places.

    The full rows are equally deep or differ by one, at random. The last row's depth is its share of the groups,
    rounded at random so that it takes its part of groups and of loose pieces alike.
    """
    capacity = max(table.capacity, 1)
    in_last = (total * table.short + int(draw(1)[0]) % capacity) // capacity
    depth, odd = divmod(total - in_last, table.full) if table.full else (0, 0)
    deeper = sort_by([], draw(table.full))[:odd]
    # Columns that not all rows reach come first: the cluster that runs on from one finds its free rows in the next.
    partly = max(in_last - depth, 0)
    columns = [deeper] if odd and not partly else []
    columns += [np.append(deeper, table.full)] * partly
    columns += [np.arange(table.full + (column < in_last)) for column in range(depth)]
    return columns


def _fill(columns: list[Ints], groups: Ints, rows: int, keys: Keys) -> Ints:
    """The row of each group, cluster after cluster through the columns, each of these in random order of its rows.

    A cluster that runs on from a column into the next one first takes the rows where it is least often.
    """
    ends = np.cumsum(groups)
    row = np.empty(len(keys), np.int64)
    used = np.zeros(rows, np.int64)  # how often the cluster that runs on is in each row
    begin, running = 0, -1
    for column in columns:
        end = begin + len(column)
        shuffled = column[sort_by([], keys[begin:end])]
        if running >= 0:
            shuffled = _least_used_first(shuffled, used, min(int(ends[running]), end) - begin)
        row[begin:end] = shuffled

        last = int(np.searchsorted(ends, end - 1, side="right"))  # the cluster in the column's last slot
        if last != running:
            used[:] = 0
        running = last if ends[last] > end else -1
        if running >= 0:
            first = int(ends[last - 1]) if last else 0
            used[row[max(first, begin) : end]] += 1
        begin = end
    return row


def _least_used_first(rows: Ints, used: Ints, number: int) -> Ints:
    """That many of the rows that are least used, then the others; both in the order given."""
    first = np.argsort(used[rows], kind="stable")[:number]
    others = np.ones(len(rows), bool)
    others[first] = False
    return np.concatenate([rows[first], rows[others]])
