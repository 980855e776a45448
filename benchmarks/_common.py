"""What every benchmark uses: data, timing in turn, peak memory in a process of its own, tables, where it ran."""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import hrem_layers

RELEASE = {"n": 128, "regions": 36, "shortest": 8, "longest": 24, "dim": 1024}


class Batch(NamedTuple):
    image_embedding: Tensor
    text_embedding: Tensor
    image_fragments: Tensor
    text_fragments: Tensor
    text_mask: Tensor


def make_batch(n: int, regions: int, shortest: int, longest: int, dim: int, *, seed: int = 0) -> Batch:
    """n images of ``regions`` regions, n texts of ``shortest`` to ``longest`` words (uniform), float32 noise."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (n, 1), generator=g)
    return Batch(
        torch.randn(n, dim, generator=g),
        torch.randn(n, dim, generator=g),
        torch.randn(n, regions, dim, generator=g),
        torch.randn(n, longest, dim, generator=g),
        torch.arange(longest) < lengths,
    )


def bare_matmul(batch: Batch) -> Callable[[], Tensor]:
    """Real words by real regions, in the orientation that was the faster one here, nothing else."""
    words, regions = batch.text_fragments[batch.text_mask], batch.image_fragments.flatten(0, 1)
    return lambda: words @ regions.t()


def options(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall",
        help="cpu = processor time, which other processes disturb less; only for one thread",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=15, help="timings of each variant, taken in turn")
    return parser


class Timing(NamedTuple):
    median: float  # seconds
    low: float  # quartiles
    high: float
    best: float


def time_in_turn(
    variants: dict[str, Callable[[], object]], repeats: int, clock: str = "wall", *, warm_up: bool = True
) -> dict[str, Timing]:
    seconds = seconds_in_turn(variants, repeats, clock, warm_up=warm_up)
    return {name: summarize(values) for name, values in seconds.items()}


def seconds_in_turn(
    variants: dict[str, Callable[[], object]], repeats: int, clock: str = "wall", *, warm_up: bool = True
) -> dict[str, list[float]]:
    """Each variant once, to ``warm_up``, then ``repeats`` rounds in which each runs once: noise meets all alike."""
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    for run in variants.values() if warm_up else ():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            start = now()
            run()
            seconds[name].append(now() - start)
    return seconds


def summarize(values: list[float]) -> Timing:
    quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Timing(statistics.median(values), quartiles[0], quartiles[2], min(values))


def ratio_table(timings: dict[str, Timing], base: str) -> str:
    """A row a variant: median and quartiles in ms, ratio of medians and of best times to ``base``."""
    head = ["", "median ms", "quartiles ms", f"median / {base}", f"best / {base}"]
    rows = []
    for name, t in timings.items():
        b = timings[base]
        rows.append([
            name, f"{t.median * 1e3:.1f}", f"{t.low * 1e3:.1f} to {t.high * 1e3:.1f}",
            f"{t.median / b.median:.2f}", f"{t.best / b.best:.2f}",
        ])  # fmt: skip
    return table(head, rows)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def section(title: str, *paragraphs: str) -> None:
    """Prints a part of docs/performance.md."""
    print("\n\n".join([f"## {title}", *paragraphs, where()]), flush=True)


def where() -> str:
    command = shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    threads = torch.get_num_threads()
    return (
        f"`{command}`: Python {platform.python_version()}, PyTorch {torch.__version__}, {numba_version()}, {threads} "
        f"thread{'s' * (threads != 1)}, {processor()}, {os.cpu_count()} cores, {platform.system()}; load before "
        f"{LOAD:.1f}; {revision()}."
    )


def numba_version() -> str:
    """Of what compiles the CPU kernels, where they are."""
    try:
        return f"Numba {importlib.metadata.version('numba')}"
    except importlib.metadata.PackageNotFoundError:
        return "no Numba"


LOAD = os.getloadavg()[0]


def revision() -> str:
    """Of the code that is measured: git's, or the version where there is no git."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        changed = git("status", "--porcelain", "--", "hrem_layers", "benchmarks/*.py")
        return f"revision {git('rev-parse', '--short=7', 'HEAD').strip()}{' with changes' * bool(changed.strip())}"
    except (OSError, subprocess.CalledProcessError):
        return f"version {hrem_layers.__version__}"


def processor() -> str:
    """The processor's name; what the system hides stays hidden."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
        names = {key.strip(): value.strip() for key, value in fields.items()}
        return f"{names['model name']} (family {names['cpu family']}, model {names['model']})"
    except (OSError, KeyError, ValueError):
        return platform.processor() or platform.machine()


def extra_peak_mb(work: Callable[[], object]) -> float:
    """Peak resident memory of this process during ``work`` over that before it, in MB (10⁶ bytes); Linux only.

    Call it in a fresh process, after a warm-up at small size: memory that the allocator has hidden away would be
    missed.
    """
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    before = status_kib("VmRSS")
    work()
    return (status_kib("VmHWM") - before) * 1024 / 1e6


def tensors_peak_mb(work: Callable[[], object]) -> float:
    """Peak of the bytes of all tensors that ``work()`` made and that are alive, in MB (10⁶ bytes): what PyTorch's
    allocator was asked for on a CPU, also inside custom operators; not what it keeps, nor what others take (MKL, gloo).

    Counted, so the same in every run. ``work`` must leave nothing alive that it finds and frees when called again.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        work()
    return recorded_peak_mb(record)


def recorded_peak_mb(record: profile) -> float:
    """:func:`tensors_peak_mb` of a profile that was made with ``profile_memory=True``."""
    with tempfile.TemporaryDirectory() as folder:
        record.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    alive = itertools.accumulate(event["args"]["Bytes"] for event in sorted(changes, key=lambda event: event["ts"]))
    return max(alive, default=0) / 1e6


def status_kib(field: str) -> int:
    """A line of Linux's /proc/self/status: VmRSS, VmHWM, ..."""
    with open("/proc/self/status", encoding="utf-8") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def in_own_process(script: str, *arguments: str, timeout: float = 900) -> str:
    """The last line that ``python script arguments`` prints."""
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        raise RuntimeError(f"{script} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return done.stdout.strip().splitlines()[-1]
