"""How often the example script survives SIGKILL: killed at random moments, resumed, and compared at the end.

    python benchmarks/reliability/kills.py --kills 30

Trains on a few hundred synthetic pairs, with a checkpoint after every step. One run is left alone. Others are killed
again and again, half of the times at a random moment and half while a checkpoint is written, resumed, and in the
end left to finish. Counted: checkpoints that did not load after a kill, resumes that failed, final metrics that differ
from those of the run that was left alone. Prints a line per kill on stderr and one of JSON on stdout; the exit
status is 1 if anything of that happened.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests")]

import checkpoint  # noqa: E402
from example_runs import SCRIPT, command, results  # noqa: E402
from precomputed import write_folder  # noqa: E402

TIMEOUT = 600.0


def start(data: Path, output: Path, options: list[str]) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(SCRIPT.parent)])}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *command(data, output, *options)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def kill_at_random(run: subprocess.Popen[str], folder: Path, draw: random.Random) -> bool:
    """After it has gone on for a while: from the first new checkpoint on, up to three seconds."""
    before = stamp(folder / "last.pt")
    wait_until(run, lambda: stamp(folder / "last.pt") != before)
    time.sleep(draw.uniform(0, 3))
    return kill(run)


def kill_while_saving(run: subprocess.Popen[str], folder: Path, draw: random.Random) -> bool:
    """When one of the next checkpoints is there in part."""
    before = stamp(folder / "last.pt")
    wait_until(run, lambda: stamp(folder / "last.pt") != before)
    for _ in range(draw.randint(1, 4)):
        wait_until(run, lambda: not in_part(folder))
        wait_until(run, lambda: in_part(folder))
    return kill(run)


def kill(run: subprocess.Popen[str]) -> bool:
    """False if it had ended before."""
    if run.poll() is not None:
        return False
    run.kill()
    run.communicate()
    return True


def wait_until(run: subprocess.Popen[str], happened: object) -> None:
    deadline = time.monotonic() + TIMEOUT
    while run.poll() is None and not happened():  # type: ignore[operator]
        if time.monotonic() > deadline:
            run.kill()
            raise TimeoutError("the script makes no progress")
        time.sleep(0.0005)


def stamp(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def in_part(folder: Path) -> bool:
    return any(folder.glob(".*.partial*"))


def finish(run: subprocess.Popen[str]) -> str | None:
    """None if it went well, else what it printed."""
    output = run.communicate(timeout=TIMEOUT)[0]
    return None if run.returncode == 0 else output


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kills-per-run", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--script-option", action="append", default=[], help="handed on, such as --sampler=neighbor")
    arguments = parser.parse_args(argv)
    draw = random.Random(arguments.seed)
    options = ["--epochs", str(arguments.epochs), "--checkpoint-every", "1", *arguments.script_option]
    counts = dict.fromkeys(
        ("kills", "while_saving", "checkpoints_damaged", "resumes_failed", "runs", "runs_with_other_metrics"), 0
    )
    with tempfile.TemporaryDirectory() as scratch:
        data = write_folder(Path(scratch) / "data", train=64)
        if problem := finish(start(data, Path(scratch) / "whole", options)):
            raise RuntimeError(problem)
        whole = results(Path(scratch) / "whole")
        while counts["kills"] < arguments.kills:
            counts["runs"] += 1
            folder = Path(scratch) / f"killed-{counts['runs']}"
            for _ in range(min(arguments.kills_per_run, arguments.kills - counts["kills"])):
                run = start(data, folder, [*options, "--resume"])
                how = draw.choice([kill_at_random, kill_while_saving])
                if not how(run, folder, draw):  # it has ended before
                    counts["resumes_failed"] += run.returncode != 0
                    break
                counts["kills"] += 1
                counts["while_saving"] += in_part(folder)
                place = "no checkpoint yet"
                if (folder / "last.pt").exists():
                    try:
                        place = str(checkpoint.load(folder / "last.pt")["sampler"])
                    except ValueError as error:
                        counts["checkpoints_damaged"] += 1
                        place = str(error)
                print(f"kill {counts['kills']}, {how.__name__}: {place}", file=sys.stderr, flush=True)
            if problem := finish(start(data, folder, [*options, "--resume"])):
                counts["resumes_failed"] += 1
                print(problem, file=sys.stderr)
            elif results(folder) != whole:
                counts["runs_with_other_metrics"] += 1
    print(json.dumps(counts))
    return int(any(counts[key] for key in ("checkpoints_damaged", "resumes_failed", "runs_with_other_metrics")))


if __name__ == "__main__":
    sys.exit(main())
