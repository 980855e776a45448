"""Pretrained word vectors as GloVe, fastText and word2vec write them, or as .npz."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import processes


def read_word_vectors(path: Path, wanted: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Vectors (d,) float32 of the ``wanted`` words (None: of all).

    Text, or text in .gz: a word and its numbers per line; a first line that says how many words and numbers there are
    (fastText, word2vec), spaces at the end of lines, words with spaces inside, a byte order mark and empty lines
    are all met in files of the field. Of a word that stands there twice the first counts. Or .npz: ``words`` (n,)
    of strings and ``vectors`` (n, d).

    Raises:
        ValueError: the file is missing or is none of these, or a vector is not finite; with file and line.
    """
    if not path.is_file():
        raise ValueError(f"--word-vectors: expected a file of word vectors, found no file {path}")
    wanted = None if wanted is None else set(wanted)
    try:
        with path.open("rb") as file:
            begin = file.read(4)
        suffix = path.suffix.lower()
        if suffix == ".npz" or begin == b"PK\x03\x04":
            return _read_npz(path, wanted)
        with gzip.open(path, "rb") if suffix == ".gz" or begin[:2] == b"\x1f\x8b" else path.open("rb") as file:
            return _read_text(path, file, wanted)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: expected a complete file of word vectors, found one that ends or breaks ({error})"
        ) from error


def _read_text(path: Path, lines: Iterable[bytes], wanted: set[str] | None) -> dict[str, np.ndarray]:
    vectors: dict[str, np.ndarray] = {}
    promised, size, count = None, None, 0
    for number, line in _numbered(lines):
        if size is None and (header := _header(line)):
            promised, size = header
            continue
        if size is None:
            size = _size_of_first(line)
        fields = line.rsplit(None, size)
        count += 1
        if len(fields) == size and line[:1].isspace():
            continue  # the word is a space of some kind, which no caption holds
        word = fields[0].lstrip(" \t")
        try:
            if "\0" in line:
                raise ValueError("a zero byte: another encoding than UTF-8, or no text")
            if any("." in part and _is_number(part) for part in word.split()[1:]):
                raise ValueError("more numbers")
            if size < 2 or len(fields) != size + 1:
                raise ValueError(f"{len(fields) - 1} numbers")
            if wanted is not None and word not in wanted:
                float(fields[1]), float(fields[-1])  # the rest of it is of no interest
            elif word not in vectors:
                with np.errstate(over="ignore"):
                    vectors[word] = np.array(fields[1:], dtype=np.float64).astype(np.float32)
                if not np.isfinite(vectors[word]).all():
                    raise ValueError("NaN or inf")
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number}: expected a word and {max(size, 2)} finite numbers, "
                f"found {line[:60]!r} ({error})"
            ) from error
    if not count:
        raise ValueError(f"{path}: expected a word and its numbers per line, found no line")
    if promised is not None and promised != count:
        processes.warn(f"{path}: line 1 speaks of {promised} words, there are {count}: is the file whole?")
    return vectors


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, str]]:
    r"""Lines with their numbers from 1 on, without ends, those that are not empty. Only ``\n`` ends a line: some words
    are U+0085 or U+2028. Bytes that are no UTF-8 spoil their word alone."""
    for number, content in enumerate(lines, start=1):
        line = content.decode("utf-8-sig" if number == 1 else "utf-8", "replace").rstrip(" \t\r\n")
        if line:
            yield number, line


def _header(line: str) -> tuple[int, int] | None:
    fields = line.split()
    return (int(fields[0]), int(fields[1])) if len(fields) == 2 and all(f.isdecimal() for f in fields) else None


def _size_of_first(line: str) -> int:
    """How many numbers stand at the end of the line, without a word that is a number itself."""
    fields = line.split()
    size = 0
    while size < len(fields) - 1 and _is_number(fields[-1 - size]):
        size += 1
    return size


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_npz(path: Path, wanted: set[str] | None) -> dict[str, np.ndarray]:
    expected = "expected an .npz of arrays 'words' and 'vectors'"
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as archive:
            if missing := {"words", "vectors"} - set(archive.files):
                raise ValueError(f"no {' and no '.join(sorted(missing))} among {archive.files}")
            words, vectors = np.asanyarray(archive["words"]), np.asanyarray(archive["vectors"])
    except Exception as error:  # of zipfile or of the parser of a header: what a damaged file can lead to is open
        raise ValueError(f"{path}: {expected}: {error or type(error).__name__}") from error
    try:
        if words.ndim != 1 or words.dtype.kind not in "US":
            raise ValueError(f"'words': expected strings of shape (n,), found {words.dtype} {words.shape}")
        if vectors.ndim != 2 or vectors.dtype.kind not in "fiu" or vectors.shape[1] < 1 or len(vectors) != len(words):
            raise ValueError(
                f"'vectors': expected numbers of shape ({len(words)}, d), found {vectors.dtype} {vectors.shape}"
            )
        with np.errstate(over="ignore"):
            vectors = vectors.astype(np.float32)
        bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
        if len(bad):
            raise ValueError(f"'vectors': expected finite numbers, found NaN or inf in row {bad[0]}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if words.dtype.kind == "S":
        words = np.char.decode(words, "utf-8", "replace")
    found: dict[str, np.ndarray] = {}
    for word, vector in zip(words.tolist(), vectors, strict=True):
        if wanted is None or word in wanted:
            found.setdefault(word, vector)
    return found


def say_found(path: Path, found: Iterable[str], vocabulary: list[str]) -> None:
    """How many words of ``vocabulary`` have a vector.

    Raises:
        ValueError: none has.
    """
    count = len(set(found) & set(vocabulary))
    if not count:
        raise ValueError(
            f"--word-vectors {path}: found none of the {len(vocabulary)} words of the training captions "
            "(captions are in lower case: are these vectors of the same language and case?)"
        )
    processes.say(f"word vectors: {count} of {len(vocabulary)} words found in {path}")
