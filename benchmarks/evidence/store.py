"""The CSV of trainings: one line each, appended when a training is done, so that a run goes on where it stopped."""

from __future__ import annotations

import csv
import json
import os
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

METRICS = ("rsum", "i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10")
COLUMNS = ("data", "row", "seed", "split", *METRICS, "settings", "seconds", "commit")
HERE = Path(__file__).parent
RESULTS = HERE / "results.csv"
READINGS = HERE / "readings.csv"


class Line(NamedTuple):
    """One training, read on one split: "search" (dev, while settings are searched), "dev", "test", "test:rare2" ..."""

    data: str
    row: str
    seed: int
    split: str
    metrics: dict[str, float]
    settings: dict[str, Any]
    seconds: float
    commit: str

    @property
    def key(self) -> tuple[str, str, int, str, str]:
        return self.data, self.row, self.seed, self.split, as_json(self.settings)


def as_json(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def read(path: Path) -> list[Line]:
    """The lines of ``path``; none if there is no such file. A last line that a killed run left unfinished is dropped.

    Raises:
        ValueError: the columns are others than :data:`COLUMNS`.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    if rows.fieldnames is not None and tuple(rows.fieldnames) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {','.join(COLUMNS)}, found {','.join(rows.fieldnames)}")
    return [
        Line(
            r["data"], r["row"], int(r["seed"]), r["split"], {m: float(r[m]) for m in METRICS},
            json.loads(r["settings"]), float(r["seconds"]), r["commit"],
        )
        for r in rows
    ]  # fmt: skip


def by_seed(lines: Sequence[Line], data: str, row: str, split: str, metric: str = "rsum") -> dict[int, float]:
    """Seed -> the metric, of the fresh trainings; the last line counts where settings were searched again."""
    return {x.seed: x.metrics[metric] for x in lines if (x.data, x.row, x.split) == (data, row, split)}


def append(path: Path, lines: Iterable[Line]) -> None:
    """Adds lines, each written whole; an unfinished last line is cut off first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8", newline="") as file:
        file.seek(0)
        text = file.read()
        if text and not text.endswith("\n"):
            file.truncate(len(text[: text.rfind("\n") + 1].encode()))
        file.seek(0, os.SEEK_END)
        writer = csv.writer(file, lineterminator="\n")
        if not text:
            writer.writerow(COLUMNS)
        for x in lines:
            values = [f"{x.metrics[m]:.3f}" for m in METRICS]
            seconds = f"{x.seconds:.3f}"  # no training on a quick machine is 0: times are divided by
            writer.writerow([x.data, x.row, x.seed, x.split, *values, as_json(x.settings), seconds, x.commit])


def commit() -> str:
    """The short hash of the checkout, with "+" where files are changed; "unknown" outside of git."""
    try:
        run = {"cwd": HERE, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--", "*.py"], **run).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")
