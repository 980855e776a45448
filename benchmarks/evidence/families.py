"""Splits that keep what belongs together on one side: shared stems and near-equal pictures."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

SPLITS = Path(__file__).parent / "splits"
NEAR = 0.985  # cosine of mean features from which two pictures are variants of one


def group(stems: Sequence[Hashable], captions: Sequence[Sequence[str]], features: np.ndarray) -> np.ndarray:
    """Family of each picture (n,): connected over equal stems, equal captions and near-equal ``features`` (n, F)."""
    parent = list(range(len(stems)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, (stem, said) in enumerate(zip(stems, captions, strict=True)):
        for key in (("stem", stem), *(("caption", frozenset(c.split())) for c in said)):
            parent[root(i)] = root(first.setdefault(key, i))
    x = features - features.mean(axis=0)
    x /= np.linalg.norm(x, axis=1, keepdims=True) + 1e-12
    for start in range(0, len(x), 1000):
        for i, j in zip(*np.nonzero(x[start : start + 1000] @ x.T > NEAR), strict=True):
            parent[root(start + int(i))] = root(int(j))
    return np.array([root(i) for i in range(len(stems))])


def split(families: np.ndarray, *, dev: int, test: int, seed: int = 0, read: np.ndarray | None = None) -> np.ndarray:
    """The split of each picture (n,): train, dev or test. Whole families are drawn at random until test and dev hold
    about as many as asked for; families of more than 2% of all pictures are for training.

    ``read`` (n,) bool: pictures that an earlier decision was made on. Their families are dev or train, and dev is
    drawn among them alone, so that all others remain for test and train.
    """
    members: dict[int, list[int]] = {}
    for i, family in enumerate(families.tolist()):
        members.setdefault(family, []).append(i)
    order = sorted(members)
    random.Random(seed).shuffle(order)
    out = np.full(len(families), "train", dtype="<U5")
    wanted = {"test": test, "dev": dev}
    for family in order:
        if len(members[family]) > 0.02 * len(families):
            continue
        known = read is not None and bool(read[members[family]].any())
        for name in wanted if read is None else ("dev",) if known else ("test",):
            if wanted[name] > 0:
                out[members[family]] = name
                wanted[name] -= len(members[family])
                break
    return out


def read_before(names: Sequence[str], path: Path) -> np.ndarray | None:
    """Which of ``names`` the file lists, a name per line, (n,) bool; None if there is no file."""
    if not path.is_file():
        return None
    listed = set(path.read_text(encoding="utf-8").splitlines())
    return np.array([name in listed for name in names])


def write(path: Path, names: Sequence[str], splits: np.ndarray) -> None:
    """A line ``split<TAB>name`` for dev and test; the first line holds the checksum of the whole assignment."""
    lines = [f"{s}\t{n}" for s, n in zip(splits.tolist(), names, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in lines if not line.startswith("train")]
    path.write_text("\n".join([f"# sha256 {checksum(lines)}", *kept]) + "\n", encoding="utf-8")


def read(path: Path, names: Sequence[str]) -> np.ndarray:
    """The split of each of ``names``.

    Raises:
        ValueError: names and file do not make the assignment that was written, as with another package version.
    """
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    held = dict(reversed(line.split("\t", 1)) for line in rest)
    splits = [held.get(name, "train") for name in names]
    got = checksum([f"{s}\t{n}" for s, n in zip(splits, names, strict=True)])
    if first != f"# sha256 {got}":
        raise ValueError(f"{path}: expected {first[2:]}, got sha256 {got}: the source's pictures are others than then")
    return np.array(splits)


def checksum(lines: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
