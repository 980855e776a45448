"""Where a run is kept: one run per folder, one process (or group of them) per run, and what resuming asks of both."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint
import checkpoint_checks
import processes
from options import MAY_DIFFER, flag

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LEFT_BY_A_RUN = ("last.pt", "best.pt", "metrics.json")


def choose(arguments: argparse.Namespace) -> Path:
    """Where to write: what was asked for, else the next free folder in runs/. It exists afterwards."""
    folder = arguments.output_dir
    if folder is None and arguments.resume:
        folder = arguments.resume.parent
    try:
        if folder is None:
            base = Path("runs") / (arguments.data_dir.resolve().name if arguments.data_dir else "emoji")
            folder = Path(processes.from_main(str(_next_free(base)) if processes.is_main() else ""))
        elif processes.is_main():
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"--output-dir {folder or 'runs'}: no folder can be made there ({error.strerror})") from error
    processes.wait()
    return folder


def _next_free(base: Path) -> Path:
    base.parent.mkdir(parents=True, exist_ok=True)
    number, folder = 1, base
    while True:
        try:
            folder.mkdir()  # fails if another run was faster
            return folder
        except FileExistsError:
            number += 1
            folder = base.with_name(f"{base.name}-{number}")


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """While it lasts, ``folder`` is this run's. The end of the process, however it comes, ends it too.

    Raises:
        FileExistsError: another run writes to the folder now.
        OSError: nothing can be written there.
    """
    if fcntl is None or not processes.is_main():
        yield
        return
    try:
        opened = (folder / ".lock").open("a+")
    except OSError as error:
        raise OSError(f"--output-dir {folder}: nothing can be written there ({error.strerror})") from error
    with opened as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers would inherit it and outlive a kill
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise FileExistsError(
                f"{folder} is in use by another run ({file.read().strip() or 'of unknown number'}): wait for its end, "
                "or give another --output-dir"
            ) from None
        except OSError:
            pass  # a file system without locks
        file.truncate(0)
        file.write(f"process {os.getpid()}\n")
        file.flush()
        yield


def resume_from(arguments: argparse.Namespace, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, checked, and where it was; None if there is none to go on from.

    Raises:
        ValueError, OSError: it is damaged, of another run than what ``folder`` holds, or was made with other options.
    """
    left = [name for name in LEFT_BY_A_RUN if os.path.lexists(folder / name)]  # a link to what is not there, too
    if arguments.resume is None:
        if left:
            raise FileExistsError(
                f"--output-dir {folder} holds the checkpoint of another run: give --resume to go on with it, "
                f"or another folder (found {', '.join(left)})"
            )
        return None
    path = arguments.resume or folder / "last.pt"
    if not arguments.resume and "last.pt" not in left:
        if left:
            raise FileExistsError(f"--resume: {folder} holds {', '.join(left)} of a run, but no last.pt to go on from")
        processes.say(f"--resume: no {path} yet, starting from the beginning")
        return None
    state = checkpoint.load(path)
    checkpoint_checks.check(path, state, to_go_on=True)
    elsewhere = not path.resolve().parent.samefile(folder)
    if elsewhere:  # of curves and pictures nothing says whose they are
        left += [name for name in ("report.png", "tensorboard") if (folder / name).exists()]
    if left and elsewhere:
        raise FileExistsError(
            f"--output-dir {folder} holds another run ({', '.join(left)}), which going on from {path} would overwrite: "
            "give another folder"
        )
    for name in left:
        if (other := _run_of(folder / name)) not in (None, state["run_id"]):
            raise FileExistsError(f"{folder / name} is of another run ({other}) than {path} ({state['run_id']})")
    _check_options(path, state, arguments)
    return path, state


def _run_of(path: Path) -> str | None:
    """Which run has left this file; None if it cannot be read: then it is written anew."""
    try:
        content = json.loads(path.read_text("utf-8")) if path.suffix == ".json" else checkpoint.load(path)
        return str(content["run_id"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        processes.warn(f"{path} does not load, and will be overwritten")
        return None


def _check_options(path: Path, state: dict[str, Any], arguments: argparse.Namespace) -> None:
    now = plain(arguments)
    changed = [
        f"{flag(name)} was {state['arguments'][name]!r} and is now {now[name]!r}"
        for name in sorted(now)
        if name not in MAY_DIFFER | {"word_vectors"} and state["arguments"][name] != now[name]
    ]
    if changed:
        raise ValueError(f"--resume {path}: the run that it goes on with was started otherwise: {'; '.join(changed)}")
    if state["sampler"]["epoch"] > arguments.epochs:
        raise ValueError(
            f"--epochs {arguments.epochs}: {path} has {state['sampler']['epoch']} epochs behind it already"
        )
    if len(state["random"]) != processes.count():
        raise ValueError(
            f"--resume: the checkpoint was written by {len(state['random'])} processes, "
            f"this run has {processes.count()}"
        )


def plain(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options as a checkpoint holds them: numbers, strings, lists."""
    return {
        key: str(x) if isinstance(x, Path) else [str(p) for p in x] if key == "eval_only" and x else x
        for key, x in vars(arguments).items()
    }


def check_same_data(path: Path, saved: dict[str, str], now: dict[str, str], folder: Path) -> None:
    """Raises ValueError that says which files of ``folder`` are not what the run at ``path`` was trained on.

    The test split may be another one, but not another one of the same name.
    """
    trained_on = {name for name in saved.keys() | now.keys() if name.startswith(("train_", "dev_", "the "))}
    changed = [
        f"{folder / name if '.' in name else name} was {saved.get(name, 'not there')} and is now "
        f"{now.get(name, 'not there')}"
        for name in sorted(trained_on | (saved.keys() & now.keys()))
        if saved.get(name) != now.get(name)
    ]
    if changed:
        raise ValueError(f"--resume {path}: the data are not those that the run began with: {'; '.join(changed)}")
