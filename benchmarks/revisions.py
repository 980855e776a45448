"""Two revisions of this repository side by side: processor time of the same work, in turn, in a process of each.

    python benchmarks/revisions.py v0.1.0                  # that revision against the working tree
    python benchmarks/revisions.py HEAD~20 HEAD --dims 256

A ratio below 1 says that the second is faster. Where git does not know the revision (a copy without history), it says
so and measures nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from _common import RELEASE, section, table

ROOT = Path(__file__).parent.parent


def export(revision: str, folder: Path) -> Path:
    """The files of a git revision."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), "archive", revision], capture_output=True)
    except OSError as error:
        raise LookupError("there is no git") from error
    if done.returncode:
        raise LookupError(done.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def works(n: int, dim: int, threads: int) -> dict[str, Callable[[], object]]:
    """What is timed; only names and options that all revisions have."""
    import torch
    from _common import make_batch

    from hrem_layers import AssociationGraph, HREMLoss, align_fragments

    torch.set_num_threads(threads)
    batch = make_batch(n, RELEASE["regions"], RELEASE["shortest"], RELEASE["longest"], dim)
    torch.manual_seed(0)
    detached, full = HREMLoss(dim), HREMLoss(dim, graph=AssociationGraph(detach_fragments=False))

    def align(with_grad: bool) -> None:
        images, texts = (x.clone().requires_grad_(with_grad) for x in batch[2:4])
        scores = align_fragments(images, texts, None, batch.text_mask)
        if with_grad:
            sum(x.square().sum() for x in scores).backward()

    def graph() -> None:
        with torch.no_grad():
            detached.graph(*batch[:4], None, batch.text_mask)

    def step(loss: HREMLoss) -> None:
        loss.zero_grad()
        loss(*(x.detach().requires_grad_() for x in batch[:4]), None, batch.text_mask).backward()

    return {
        "alignment, forward": lambda: align(False),
        "alignment, forward and backward": lambda: align(True),
        "graph, forward": graph,
        "HREMLoss step, fragments detached": lambda: step(detached),
        "HREMLoss step, detach_fragments=False": lambda: step(full),
    }


def serve(n: int, dim: int, threads: int) -> None:
    """For every line that comes in, the processor seconds of every work, as one line of JSON."""
    every = works(n, dim, threads)
    for work in every.values():
        work()
    for _ in sys.stdin:
        seconds = {}
        for name, work in every.items():
            start = time.process_time()
            work()
            seconds[name] = time.process_time() - start
        print(json.dumps(seconds), flush=True)


class Server:
    def __init__(self, root: Path, n: int, dim: int, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": str(threads)}
        sizes = [str(x) for x in (n, dim, threads)]
        command = [sys.executable, __file__, "--serve", *sizes]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self) -> dict[str, float]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a revision could not do the work; what it said is above")
        return json.loads(line)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def main() -> None:
    if sys.argv[1:2] == ["--serve"]:
        serve(*map(int, sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", help="a git revision")
    parser.add_argument("new", nargs="?", help="another; left out: the working tree")
    parser.add_argument("--n", type=int, default=RELEASE["n"], help="N")
    parser.add_argument("--dims", type=int, nargs="+", default=[RELEASE["dim"]], help="D")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    title, names = "Two revisions", f"{arguments.old} and {arguments.new or 'the working tree'}"
    with ExitStack() as stack:
        try:
            roots = [
                export(revision, Path(stack.enter_context(tempfile.TemporaryDirectory()))) if revision else ROOT
                for revision in (arguments.old, arguments.new)
            ]
        except LookupError as error:
            section(title, f"**Not measured**: {names} are not both at hand ({error}).")
            return
        columns = [compare(roots, arguments.n, dim, arguments.threads, arguments.repeats) for dim in arguments.dims]
    section(
        title,
        f"{names}: N = {arguments.n}, processor time, in turn; new / old, median of {arguments.repeats} rounds with "
        "their range.",
        table(
            ["", *(f"D = {dim}" for dim in arguments.dims)],
            [[name, *(column[name] for column in columns)] for name in columns[0]],
        ),
    )


def compare(roots: list[Path], n: int, dim: int, threads: int, repeats: int) -> dict[str, str]:
    """Of every work the ratio of seconds, second to first."""
    with ExitStack() as stack:
        servers = [Server(root, n, dim, threads) for root in roots]
        for server in servers:
            stack.callback(server.close)
        rounds = [[server.ask() for server in servers] for _ in range(repeats)]
    found = {}
    for name in rounds[0][0]:
        ratios = sorted(new[name] / old[name] for old, new in rounds)
        found[name] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    return found


if __name__ == "__main__":
    main()
