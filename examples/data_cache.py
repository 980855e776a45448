"""Data folders that are made once: whole under their name, or not there."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


def made_once(cache_dir: Path, kind: str, made_from: dict[str, Any], build: Callable[[Path], None]) -> Path:
    """Returns the folder of what ``made_from`` makes; ``build`` fills it if it is not there yet, or damaged.

    The folder's name depends on ``made_from``, so that other settings or packages make a new one. It appears under
    that name when it is whole: a run that is killed leaves only a folder ``.partial-...`` behind, which may be
    deleted. ``build`` writes a ``metadata.json`` with all of ``made_from``, and ``files``: the size of each file.
    """
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:10]
    folder = Path(cache_dir).expanduser() / f"{kind}-{digest}"
    if is_whole(folder, made_from):
        return folder
    partial = folder.with_name(f".partial-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        build(partial)
        if folder.exists() and not is_whole(folder, made_from):
            shutil.rmtree(folder)  # damaged
        try:
            os.replace(partial, folder)
        except OSError:
            if not is_whole(folder, made_from):  # else another process was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def is_whole(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether ``folder`` was made from just that, and every file has the size that it was written with."""
    try:
        metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        return all(metadata[key] == value for key, value in made_from.items()) and all(
            (folder / name).stat().st_size == size for name, size in metadata["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def write_metadata(folder: Path, content: dict[str, Any]) -> None:
    """The last file of a folder: ``content`` and the sizes of all others."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "metadata.json").write_text(json.dumps({**content, "files": sizes}, indent=1), encoding="utf-8")
