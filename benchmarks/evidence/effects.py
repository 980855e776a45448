"""What moves rSum by how much: settings, the pair loss, relations, neighbour batches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from benchmarks.evidence import store
from benchmarks.evidence.statistics import Difference, number, paired

COLUMNS = {
    "InfoNCE − triplet": ("base_infonce", "base"),
    "relations": ("relations_gated", "base"),
    "relations on InfoNCE": ("relations_gated_infonce", "base_infonce"),
    "recipe, without the gate": ("recipe", "base"),
    "on InfoNCE, without the gate": ("relations_infonce", "base_infonce"),
    "neighbours, half": ("neighbors_half", "base"),
    "neighbours, half, on InfoNCE": ("neighbors_half_infonce", "base_infonce"),
}
# data whose test splits were read after what is compared was fixed
UNREAD = (("icons", "openclipart", "stamps"), ("icons+epochs6", "openclipart+epochs12", "stamps+epochs12"))


def difference_of(lines: Sequence[store.Line], data: str, row: str, other: str, split: str) -> Difference | None:
    """row − other of rSum, over the seeds that both have; None if there are none."""
    a, b = store.by_seed(lines, data, row, split), store.by_seed(lines, data, other, split)
    common = sorted(a.keys() & b.keys())
    return paired([a[s] for s in common], [b[s] for s in common]) if common else None


def at_equal_settings(lines: Sequence[store.Line], data: str, row: str, other: str) -> Difference | None:
    """row − other of rSum on dev over the search's trainings that both have, of equal settings and seed.

    Which settings were chosen for whom, which on few trainings is partly chance, has no part in it.
    """
    a, b = (
        {
            (store.as_json(x.settings), x.seed): x.metrics["rsum"]
            for x in lines
            if x[:2] == (data, r) and x.split == "search"
        }
        for r in (row, other)
    )
    common = sorted(a.keys() & b.keys())
    return paired([a[k] for k in common], [b[k] for k in common]) if len(common) > 1 else None


def equal_settings_section(lines: Sequence[store.Line]) -> str:
    """The table of :func:`at_equal_settings` of the rows on relations."""
    columns = [x for x in COLUMNS.items() if x[0].startswith("relations")]
    body = []
    for data in dict.fromkeys(x.data for x in lines):
        found = [at_equal_settings(lines, data, *rows) for _, rows in columns]
        if any(found):
            cells = ["" if d is None else f"{number(d.mean, True)} ± {number(d.half)} ({d.n})" for d in found]
            body.append(f"| {' | '.join([data, *cells])} |")
    if not body:
        return ""
    return "\n".join([
        "### At equal settings\n",
        "Which settings a row is read with was chosen on few trainings, which is partly chance, and moves more than "
        "relations do. So also the differences on dev over all trainings of the search, each to that of the base with "
        "the same settings and seed (in brackets how many; good settings and bad ones alike):\n",
        f"| data | {' | '.join(name for name, _ in columns)} |",
        f"|---|{'---|' * len(columns)}",
        *body,
    ]) + "\n"  # fmt: skip


def combined(
    lines: Sequence[store.Line], row: str, other: str, split: str, unread: Sequence[str] = UNREAD[0]
) -> tuple[list[str], Difference] | None:
    """row − other, averaged over the unread data sets seed by seed; which they are, and the paired difference."""
    sets = [d for d in unread if difference_of(lines, d, row, other, split) is not None]
    if not sets:
        return None
    a, b = ([store.by_seed(lines, d, r, split) for d in sets] for r in (row, other))
    seeds = sorted(set.intersection(*(set(x) for x in [*a, *b])))
    if not seeds:
        return None
    return sets, paired(
        [sum(x[s] for x in a) / len(sets) for s in seeds], [sum(x[s] for x in b) / len(sets) for s in seeds]
    )


def effects_section(lines: Sequence[store.Line], split: str = "test") -> str:
    """What moves rSum by how much: settings, the pair loss, relations, neighbour batches."""
    columns = COLUMNS
    out = [
        "\n## What moves rSum by how much\n",
        "Range of `base` on dev over the settings that were tried, then differences on test, every row with its own "
        "best settings, paired by seed, 95% interval; last, CPU time of a training with relations over one without.\n",
        f"| data | settings of the base | {' | '.join(columns)} | time |",
        f"|---|---|{'---|' * len(columns)}---|",
    ]
    for data in dict.fromkeys(x.data for x in lines):
        tried = [x.metrics["rsum"] for x in lines if (x.data, x.row, x.split) == (data, "base", "search")]
        cells = [data, f"{min(tried):.0f} to {max(tried):.0f} ({len(tried)})" if tried else ""]
        for row, other in columns.values():
            d = difference_of(lines, data, row, other, split)
            cells.append("" if d is None else f"{number(d.mean, True)} ± {number(d.half)}")
        cells.append(_time_ratio(lines, data))
        out.append(f"| {' | '.join(cells)} |")
    for title, unread in itertools.product(columns, UNREAD):
        if (found := combined(lines, *columns[title], split, unread)) is not None:
            sets, d = found
            out.append(
                f"\nMean over {', '.join(sets)}, {title}: {number(d.mean, True)} ± {number(d.half)} "
                f"({d.n} seeds; could see {number(d.detectable)})."
            )
    return "\n".join(out) + "\n"


def _time_ratio(lines: Sequence[store.Line], data: str) -> str:
    """Of equal settings, all in the search: both ran in turn on the same machine."""
    seconds: dict[str, dict[str, float]] = {}
    for x in lines:
        if (x.data, x.split) == (data, "search"):
            seconds.setdefault(x.row, {})[store.as_json(x.settings)] = x.seconds
    ratios = [
        ours / seconds[other][key]
        for row, other in (*COLUMNS.values(), ("relations", "base"))
        if row not in ("base_infonce", "neighbors_half", "neighbors_half_infonce")
        for key, ours in seconds.get(row, {}).items()
        if key in seconds.get(other, {})
    ]
    return f"{sum(ratios) / len(ratios):.1f}" if ratios else ""
