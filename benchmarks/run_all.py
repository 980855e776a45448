"""Runs the benchmarks and writes what they print into the pages of docs/.

python benchmarks/run_all.py                                     # all: about an hour on two idle cores
python benchmarks/run_all.py alignment_ratio.py loss_ratio.py    # these
python benchmarks/run_all.py --list                              # which figures of which page come from which command
python benchmarks/run_all.py --quick                             # few rounds, small sizes, into copies of the pages

A page holds figures between two comments, ``<!-- figures: COMMAND -->`` and ``<!-- end -->``. They are written after
every script, with a digest of the code that made them, so that a run which was cut off goes on where it was: what the
code of today has measured is not measured again (``--again``: it is). A script that fails leaves the page alone.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
END = "<!-- end -->"


class Figures(NamedTuple):
    command: str
    page: str
    minutes: float
    """On two idle cores, roughly."""
    quick: str = ""
    """More options, for --quick."""
    needs: str = ""
    """A folder without which the figures stay as they are, and how to get it: ``FOLDER: command``."""

    @property
    def script(self) -> str:
        return self.command.split()[0]


FIGURES = (
    Figures("alignment_ratio.py", "performance.md", 0.7, "--repeats 3"),
    Figures("alignment_grid.py --sizes 64 128 256 512 --repeats 3", "performance.md", 4.5, "--sizes 64 --dims 256"),
    Figures("alignment_grid.py --sizes 1024", "performance.md", 8.5, "--sizes 64"),
    Figures("loss_ratio.py", "performance.md", 0.3, "--repeats 3"),
    Figures(
        "authors_step.py",
        "performance.md",
        2.2,
        "--repeats 3",
        "runs/HREM: git clone https://github.com/CrossmodalGroup/HREM runs/HREM",
    ),
    Figures("warmup_and_captions.py", "performance.md", 0.3, "--repeats 3"),
    Figures("revisions.py 7ea6736 --dims 1024 256", "performance.md", 1, "--repeats 3 --n 32"),
    Figures("peers.py", "performance.md", 5.5, "--quick"),
    Figures("retrieval_speed.py --large", "performance.md", 0.5, "--images 200 --repeats 3 --large-images 200"),
    Figures("memory.py", "performance.md", 2.6),
    Figures("cost_curves.py", "performance.md", 4.6, "--largest 128"),
    Figures("autocast.py", "performance.md", 0.4, "--repeats 3"),
    Figures("dtype_error.py", "performance.md", 0.4, "--seeds 1"),
    Figures("compile.py", "performance.md", 2.4, "--repeats 3"),
    Figures("alignment_gpu.py", "performance.md", 0.1),
    Figures("kernel_figures.py", "performance.md", 1.4),
    Figures("sparse_scaling.py", "scaling.md", 1.5, "--sizes 256 512"),
    Figures("scaling_counts.py --measured", "scaling.md", 5.5, "--sizes 64 --loss-sizes 64"),
    Figures("scaling_counts.py --arithmetic", "scaling.md", 0.1),
    Figures("scaling_counts.py --check", "scaling.md", 0.5),
    Figures("distributed_counts.py", "distributed.md", 2, "--items 64"),
    Figures("distributed_counts.py --memory", "distributed.md", 9.6, "--items 256 --dense-items 128 --dim 64"),
    Figures("large_batches.py", "large_batches.md", 1.8, "--largest 1024"),
    Figures("sampler_scale.py clusters", "sampler.md", 1.2, "--scale 0.01"),
    Figures("sampler_scale.py order", "sampler.md", 0.6, "--scale 0.01"),
)
# Too long for a run of everything, or no figures of this machine's: the page says how each was made.
SEPARATE = (
    ("scaling.md", "python benchmarks/candidates_effect.py", "15 trainings: half an hour"),
    ("reliability.md", "make mutants; python benchmarks/reliability/{bad_input,drift,loss_dtypes,kills}.py", "hours"),
    ("reliability.md", "python benchmarks/reliability/report.py", "writes the page from their results"),
    ("results.md", "python -m benchmarks.evidence; python -m benchmarks.evidence.graph_quality, .collapse", "days"),
    ("results.md", "python -m benchmarks.evidence.tables", "writes the page from their results"),
    ("../README.md", "python examples/seeds.py", "trainings; the tables of times are performance.md's"),
)
# Made by another script as well: for one look alone.
PARTS = ("pair_losses.py", "clustering.py")  # of peers.py


def digest(script: str) -> str:
    """Of the library and of the benchmark with what it imports of this folder."""
    ours, new = set(), {HERE / script}
    while new:
        path = new.pop()
        ours.add(path)
        names = re.findall(r"^\s*(?:import|from) ([\w, ]+?)(?: import .*)?$", path.read_text("utf-8"), re.MULTILINE)
        files = (HERE / f"{name.strip()}.py" for line in names for name in line.split(","))
        new |= {file for file in files if file.is_file()} - ours
    found = hashlib.sha256()
    for path in sorted([*ours, *(ROOT / "hrem_layers").rglob("*.py")]):
        found.update(path.read_bytes())
    return found.hexdigest()[:12]


def region(command: str) -> re.Pattern[str]:
    """Groups: the digest that was written last, and the figures."""
    return re.compile(rf"<!-- figures: {re.escape(command)}(?:, code (\w+))? -->\n(.*?)\n?{re.escape(END)}", re.DOTALL)


def written(figures: Figures, docs: Path) -> re.Match[str]:
    found = region(figures.command).search((docs / figures.page).read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"docs/{figures.page} has no place for the figures of {figures.command!r}")
    return found


def write(figures: Figures, docs: Path, code: str, printed: str) -> None:
    place = written(figures, docs)
    page = place.string
    new = f"<!-- figures: {figures.command}, code {code} -->\n\n{printed.strip()}\n\n{END}"
    (docs / figures.page).write_text(page[: place.start()] + new + page[place.end() :], encoding="utf-8")


def run(figures: Figures, quick: bool) -> str | None:
    """What the script prints; None where it failed."""
    start = time.perf_counter()
    options = " ".join([figures.command, figures.quick if quick else ""]).split()
    command = [sys.executable, f"benchmarks/{options[0]}", *options[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    failed = "" if done.returncode == 0 else f", failed:\n{done.stderr[-2000:]}"
    print(f"{figures.command}: {time.perf_counter() - start:.0f} s{failed}", file=sys.stderr, flush=True)
    return None if failed else done.stdout


def listing() -> str:
    rows = [(f"docs/{x.page}", f"python benchmarks/{x.command}", f"{x.minutes:g} min") for x in FIGURES]
    rows += [("", f"all of these: {sum(x.minutes for x in FIGURES):.0f} min", "")]
    rows += [("", "not run by this script:", ""), *((f"docs/{page}", *rest) for page, *rest in SEPARATE)]
    return "\n".join(f"{page:24} {command:80} {how_long}".rstrip() for page, command, how_long in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help="names of scripts, or of pages; none = all")
    parser.add_argument("--list", action="store_true", help="print commands with their pages, and run nothing")
    parser.add_argument("--again", action="store_true", help="also what this code has measured already")
    parser.add_argument("--quick", action="store_true", help="few rounds, small sizes; writes to runs/quick-pages")
    arguments = parser.parse_args()
    if arguments.list:
        print(listing())
        return
    unknown = set(arguments.scripts) - {name for x in FIGURES for name in (x.script, x.page)}
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; --list shows what there is")
    docs = ROOT / "docs"
    if arguments.quick:
        docs = ROOT / "runs" / "quick-pages"
        docs.mkdir(parents=True, exist_ok=True)
        for page in {x.page for x in FIGURES}:
            shutil.copy(ROOT / "docs" / page, docs)
    chosen = [x for x in FIGURES if not arguments.scripts or {x.script, x.page} & set(arguments.scripts)]
    failed = []
    for figures in chosen:
        code = digest(figures.script)
        if written(figures, docs)[1] == code and not arguments.again:
            print(f"{figures.command}: measured by this code already", file=sys.stderr, flush=True)
            continue
        folder, _, how = figures.needs.partition(": ")
        if not (ROOT / folder).is_dir():
            print(f"{figures.command}: left as it was, needs {folder}: {how}", file=sys.stderr, flush=True)
            continue
        printed = run(figures, arguments.quick)
        if printed is None:
            failed.append(figures.command)
        else:
            write(figures, docs, code, printed)
    if failed:
        print(f"failed, and their figures as they were: {', '.join(failed)}", file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
