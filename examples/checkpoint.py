"""Checkpoints that a kill at any moment cannot damage, and that load with ``weights_only=True``."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
        raise ValueError(f"{path}: expected a checkpoint of this script, found a file that does not load ({error})") from error
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
