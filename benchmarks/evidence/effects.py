"""What moves rSum by how much: settings, the pair loss, relations, neighbour batches."""

from __future__ import annotations

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
UNREAD = ("icons", "openclipart", "stamps")  # the recipe was fixed before their test splits were read


def difference_of(lines: Sequence[store.Line], data: str, row: str, other: str, split: str) -> Difference | None:
    """row − other of rSum, over the seeds that both have; None if there are none."""
    a, b = store.by_seed(lines, data, row, split), store.by_seed(lines, data, other, split)
    common = sorted(a.keys() & b.keys())
    return paired([a[s] for s in common], [b[s] for s in common]) if common else None


def combined(lines: Sequence[store.Line], row: str, other: str, split: str) -> tuple[list[str], Difference] | None:
    """row − other, averaged over the unread data sets seed by seed; which they are, and the paired difference."""
    sets = [d for d in UNREAD if difference_of(lines, d, row, other, split) is not None]
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
    for title in columns:
        if (found := combined(lines, *columns[title], split)) is not None:
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
