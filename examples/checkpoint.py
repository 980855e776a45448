"""Where a run is kept: checkpoints that a kill at any moment cannot damage, and what resuming asks of them."""

from __future__ import annotations

import argparse
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torch
from options import MAY_DIFFER


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes beside ``path``, then renames: whoever looks sees the old file or the new, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint of this script, found no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: expected a checkpoint of this script, found a file that does not load ({error})"
        ) from error
    if not isinstance(state, dict) or "arguments" not in state:
        raise ValueError(f"{path}: expected a checkpoint of this script, found another kind of file")
    return state


def random_state() -> dict[str, Any]:
    """The state of every generator that training may draw from, as tensors, numbers and strings."""
    name, keys, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, keys.tolist(), *rest],
        "python": random.getstate(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def differences(saved: dict[str, Any], now: dict[str, Any], *, may_differ: set[str]) -> list[str]:
    """What a resumed run was told otherwise than the run that it resumes, in words."""
    return [
        f"--{name.replace('_', '-')} was {saved.get(name)!r} and is now {now[name]!r}"
        for name in sorted(now)
        if name not in may_differ and saved.get(name) != now[name]
    ]


def output_folder(arguments: argparse.Namespace) -> Path:
    """Where to write: what was asked for if nothing is lost by it, else the next free folder in runs/."""
    folder = arguments.output_dir
    if folder is None and arguments.resume:
        folder = Path(arguments.resume).parent
    if folder is None:
        base = Path("runs") / (arguments.data_dir.resolve().name if arguments.data_dir else "emoji")
        number = 1
        folder = base
        while processes.is_main() and folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
        folder = Path(processes.from_main(str(folder)))
    elif arguments.resume is None and (folder / "last.pt").exists():
        raise FileExistsError(
            f"--output-dir {folder} holds the checkpoint of another run: give --resume to go on with it, "
            "or another folder"
        )
    processes.wait()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def resume_from(arguments: argparse.Namespace, folder: Path) -> dict[str, Any] | None:
    if arguments.resume is None:
        return None
    path = Path(arguments.resume) if arguments.resume else folder / "last.pt"
    if not arguments.resume and not path.exists():
        if processes.is_main():
            print(f"--resume: no {path} yet, starting from the beginning")
        return None
    state = load(path)
    now = {key: str(x) if isinstance(x, Path) else x for key, x in vars(arguments).items()}
    changed = differences(state["arguments"], now, may_differ=MAY_DIFFER | {"epochs", "test_split", "five_fold"})
    if changed:
        raise ValueError(f"--resume {path}: the run that it goes on with was started otherwise: {'; '.join(changed)}")
    return state
