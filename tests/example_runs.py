"""The example script in processes of its own, for the tests that start, kill and resume it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent.parent / "examples" / "flickr30k.py"
SMALL = [
    "--text-encoder", "bigru", "--embed-dim", "32", "--num-heads", "4", "--batch-size", "32", "--lr", "2e-3",
    "--vocabulary-min-count", "1", "--warmup-steps", "12", "--device", "cpu",
]  # fmt: skip


def command(data: Path, output: Path, *options: str) -> list[str]:
    return [*SMALL, "--data-dir", str(data), "--output-dir", str(output), *options]


def start(
    *arguments: str, launcher: tuple[str, ...] = (), script: Path = SCRIPT, **environment: str
) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *launcher, str(script), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parent), **environment},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start_by_hand(*arguments: str, processes: int = 2, script: Path = SCRIPT) -> list[subprocess.Popen]:
    """As ``srun`` does: each process knows its place, and nobody looks after them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    return [start(*arguments, script=script, **place, RANK=str(rank)) for rank in range(processes)]


def finish(process: subprocess.Popen) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def results(folder: Path) -> dict:
    content = json.loads((folder / "metrics.json").read_text())
    return {key: content[key] for key in ("test", "best_epoch", "best_dev_rsum", "history")}


def wait_for_checkpoint(process: subprocess.Popen, path: Path, epoch: int) -> None:
    """Until ``path`` stands in the middle of ``epoch`` (or later)."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists():
            place = torch.load(path, weights_only=True)["sampler"]
            if place["epoch"] >= epoch and place["batches_done"]:
                return
        time.sleep(0.02)
    raise AssertionError(
        f"no checkpoint in mid-epoch: {process.communicate()[0] if process.poll() is not None else ''}"
    )
