"""Files of a run that are whole or not there: written beside their place and renamed, sealed, and checked in full.

A checkpoint is a file of ``torch.save`` with a seal at its end, the SHA-256 of all that stands in front of it. To a zip
reader the seal is the archive's comment, so ``torch.load(path, weights_only=True)`` reads the file as any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import interrupt
import numpy as np
import torch

MARK = b"hrem-layers checkpoint, SHA-256:"
SEAL = len(MARK) + hashlib.sha256().digest_size
END = 22  # bytes of a zip's last record without comment; its first four:
END_SIGNATURE = b"PK\x05\x06"


class Damaged(ValueError):
    """A checkpoint that is not what was written, or lacks something. The message names file and key."""


# ---------------------------------------------------------------------------------------- writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A place beside ``path`` to write to; when all went well it takes the name ``path``, and is on the disk.

    Whoever looks sees the old file or the new, whole, also after a power cut. What failed leaves nothing behind.

    Raises:
        OSError: the disk is full, read-only, ...; the message names ``path``, which is as it was.
    """
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise OSError(f"{path}: could not be written ({error.strerror or error})") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """The new name is on the disk too; on systems that let a folder be opened."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems know no such thing
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


class _Sealing(io.RawIOBase):
    """Passes on what is written and hashes it; the first error is kept, as PyTorch's writer cannot pass it on."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.hash, self.held, self.error = file, hashlib.sha256(), b"", None

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        try:
            if self.error is None:
                self._pass_on(view)
        except OSError as error:
            self.error = error
        return len(view)

    def _pass_on(self, view: memoryview) -> None:
        """All but the last record, which the seal changes."""
        if len(view) < END:
            view = memoryview(self.held + view)
            self.held = b""
        for ready in (self.held, view[:-END]):
            self.hash.update(ready)
            self.file.write(ready)
        self.held = bytes(view[-END:])

    def seal(self) -> None:
        if self.error is not None:
            raise self.error
        if self.held[:4] != END_SIGNATURE or len(self.held) != END:
            raise OSError("torch.save did not write a zip archive")
        end = self.held[:-2] + SEAL.to_bytes(2, "little") + MARK
        self.hash.update(end)
        self.file.write(end + self.hash.digest())


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes ``state`` to ``path``, sealed; raises OSError as :func:`replacing`."""
    with interrupt.deferred(), replacing(path) as partial, partial.open("wb") as file:
        sealing = _Sealing(file)
        try:
            torch.save(state, sealing)
        except RuntimeError as error:
            if "DataLoader worker" in str(error):  # raised by the signal of its end, wherever the main thread is
                raise
            raise sealing.error or OSError(str(error).splitlines()[0]) from error
        sealing.seal()
        file.flush()


# ---------------------------------------------------------------------------------------- reading


def load(path: Path) -> dict[str, Any]:
    """What was saved to ``path``, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: it is another kind of file, or a single bit of it differs from what was written.
    """
    expected = f"{path}: expected a checkpoint of this script, found"
    if not path.is_file():
        raise FileNotFoundError(f"{expected} no file")
    try:
        check_whole(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Damaged as error:
        raise Damaged(f"{expected} {error}") from error
    except Exception as error:  # by what is wrong with it, of any kind
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # PyTorch advises to load it without looking at what it does
            first_line = "it holds more than tensors and plain values, or breaks off"
        raise Damaged(f"{expected} a file that does not load ({first_line})") from error
    if not isinstance(state, dict) or "arguments" not in state:
        raise Damaged(f"{expected} another kind of file: it has no key 'arguments'")
    return state


def check_whole(path: Path) -> None:
    """Raises Damaged unless the seal fits, or, of a file without one, the checksums of its parts."""
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(size - SEAL - END, 0))
        tail = file.read()
    plain = tail[-END : -END + 4] == END_SIGNATURE and tail[-2:] == b"\0\0"
    if plain:
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise Damaged(f"a damaged file: the checksum of {broken} does not fit")
        return
    if tail[:4] != END_SIGNATURE and MARK not in tail:
        raise Damaged("a file that does not end as one: cut off, or of another kind")
    total, left = hashlib.sha256(), size - (SEAL - len(MARK))
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 1 << 20))):
            total.update(block)
            left -= len(block)
        if file.read() != total.digest():
            raise Damaged("a damaged file: its contents do not fit its checksum")


# ---------------------------------------------------------------------------------------- random states


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
