"""Writes docs/reliability.md from what the other scripts here have recorded.

python benchmarks/reliability/report.py            # --check: only says whether the page is up to date
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "reliability.md"
HEAD = """<!-- Written by benchmarks/reliability/report.py; edit that. -->

# Reliability

What was done to make the package fail, how often, and what happened. Every section names the command that repeats it;
all of them are seeded. The results lie beside the scripts, in `benchmarks/reliability/`.
"""


def table(head: list[str], rows: list[list[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines)


def load(name: str) -> Any:
    path = HERE / name
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rows_of(name: str) -> list[dict[str, str]]:
    path = HERE / name
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def bad_input() -> str:
    found = load("bad_input.json")
    if found is None:
        return "## Wrong arguments\n\nNot recorded."
    names = {
        "error": "ValueError or TypeError raised by this package, argument named", "result": "a right result",
        "accepted": "a result where none can be right", "from inside": "an error from inside PyTorch or NumPy",
        "other exception": "another kind of exception", "argument not named": "an error that names no argument",
        "finite from non-finite": "a finite result of NaN or infinity", "another result": "another result",
        "right value refused": "a right value refused",
    }  # fmt: skip
    outcomes = {**dict.fromkeys(names, 0), **found["outcomes"]}
    parts = [
        "## Wrong arguments",
        "`python benchmarks/reliability/bad_input.py`. Every public name gets, for each of its arguments in turn, "
        "values of a wrong type, dtype, device, layout, shape or range, NaN and infinities, NumPy's scalars and "
        "arrays, classes for instances; and the loss gets modules of the caller's own that return the wrong thing. A "
        "script judges. "
        "240 of the cases are a test.",
        table(["outcome", "cases"], [[names[key], count] for key, count in outcomes.items()]
              + [["all", found["cases"]]]),
    ]  # fmt: skip
    if found["found"]:
        parts.append("\n".join(f"- {x['outcome']}: `{x['case']}`" for x in found["found"]))
    return "\n\n".join(parts)


def mutants() -> str:
    rows = rows_of("mutants.csv")
    judged = {(row["file"], row["function"], row["mutation"]): row["reason"] for row in rows_of("judged.csv")}
    parts: dict[str, list[int]] = {}
    open_ones, same = [], []
    for row in rows:
        part = row["file"].removeprefix("hrem_layers/").split("/")[0]
        counts = parts.setdefault(part, [0, 0, 0])
        reason = judged.get((row["file"], row["function"], row["mutation"]))
        place = f"`{row['file'].removeprefix('hrem_layers/')}`, `{row['function'] or 'module'}`: `{row['mutation']}`"
        if row["killed_by"]:
            counts[0] += 1
        elif reason:
            counts[1] += 1
            same.append(f"- {place}: {reason}")
        else:
            counts[2] += 1
            open_ones.append(f"- {place}")
    totals = [sum(x) for x in zip(*parts.values(), strict=True)] if parts else [0, 0, 0]
    share = 100 * totals[0] / max(1, totals[0] + totals[2])
    text = [
        "## Faults put into the package",
        "`make mutants`: one small fault at a time (a comparison, a sign, a constant, a dropped `not` or argument or "
        "statement, a minimum for a maximum, a tolerance a thousand times as large ...), drawn per file with seed 0, "
        "equally many of each kind. The quick tests that enter the function run until one fails. Not among them: tests "
        "in processes of their own, tests of compiled code, tests over 8 seconds.",
        table(["part", "killed", "change nothing", "survive"],
              [[part, *counts] for part, counts in sorted(parts.items())] + [["all", *totals]]),
        f"{share:.1f}% of the {totals[0] + totals[2]} faults that change something are killed.",
    ]  # fmt: skip
    if open_ones:
        text += ["Survivors that no test kills yet:", "\n".join(open_ones)]
    if same:
        text += ["Judged to change nothing that can be seen, in one process at least:", "\n".join(same)]
    return "\n\n".join(text)


def drift() -> str:
    found = load("drift.json")
    if found is None:
        return "## Drift\n\nNot recorded."
    first, last = found["record"][max(0, len(found["record"]) // 5 - 1)], found["record"][-1]
    names = {"resident_mb": "resident memory, MB", "objects": "living Python objects", "tensors": "living tensors",
             "python_blocks": "blocks that Python has allocated"}  # fmt: skip
    bad = len(found["not_finite"])
    return "\n\n".join([
        "## Drift and leaks",
        f"`python benchmarks/reliability/drift.py --steps {found['steps']} --seed {found['seed']}`: two small encoders "
        "and two kinds of HREMLoss in turn, trained on inputs that are random walks, with a step in seven an extreme "
        "one (equal images, one real fragment, a million times as large or as small, one id for all). Loss, all terms, "
        f"gradients' norm and parameters were checked at every step: not finite in {bad} steps.",
        table(["", f"step {first['step']}", f"step {last['step']}"],
              [[text, first[x], last[x]] for x, text in names.items()]),
    ])  # fmt: skip


def dtypes() -> str:
    rows = load("loss_dtypes.json")
    if rows is None:
        return "## Errors per dtype\n\nNot recorded."
    return "\n\n".join([
        "## Errors per dtype, the whole loss",
        f"`python benchmarks/reliability/loss_dtypes.py --seeds {rows[0]['seeds']}`: HREMLoss against itself in "
        "float64 with the alignment as loops over pairs, on the same rounded inputs and weights; ‖error‖ / ‖exact‖, "
        "median and largest over the batches. “Other edges” counts batches in which a neighbour is another one: "
        "there the "
        "gradient is another one, not an inexact one. (For the alignment alone: `python benchmarks/dtype_error.py`.) "
        "Where only the inputs are of a half type, what goes out is rounded to it, and nothing else is. Where "
        "the weights or "
        "autocast are bfloat16, the interaction is computed in it: the gradient of its weights is "
        "then inexact by 1% (the rounding of bfloat16), or by up to 20% where rounding takes something over a kink: a "
        "unit of the feed-forward's ReLU, or another hardest negative. (On 20 batches with `activation=\"gelu\"` and "
        "InfoNCE, which have no kinks, the largest is 1.1%; with the interaction alone in float32 the error of its "
        "gradient is below 0.05%.) Keep the weights of the loss in float32.",
        table(
            ["interaction", "dtype", "total", "gradient of embeddings", "gradient of weights", "other edges"],
            [[x["mechanism"], x["dtype"], *(f"{x[f'{k}_median']:.0e}, {x[f'{k}_largest']:.0e}"
              for k in ("total", "embeddings", "weights")), f"{x['other_edges']} of {x['seeds']}"] for x in rows],
        ),
    ])  # fmt: skip


def kills() -> str:
    found = load("kills.json")
    if found is None:
        return (
            "## Kills\n\n`python benchmarks/reliability/kills.py --kills 32 > benchmarks/reliability/kills.json` "
            "trains by the example script, kills it at random moments and while a checkpoint is written, resumes it "
            "and compares the metrics with those of a run that was left alone. No result is recorded for this version."
        )
    return "\n\n".join([
        "## Kills",
        f"`python benchmarks/reliability/kills.py --kills {found['kills']}`: the example script, killed at random "
        "moments and while a checkpoint is written, resumed, compared with a run that was left alone.",
        table(["", "times"], [[key.replace("_", " "), value] for key, value in found.items()]),
    ])  # fmt: skip


def page() -> str:
    return "\n\n".join([HEAD.rstrip(), bad_input(), mutants(), drift(), dtypes(), kills()]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args(argv)
    text = page()
    if arguments.check:
        return int(not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
