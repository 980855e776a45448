"""Any data as a folder in the field's precomputed form, {train,dev,test}_ims.npy and _caps.txt, made once."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.evidence import families, sources, synthetic

SIZE = 96  # pixels: 9 grid cells of EfficientNet-Lite0
SMALL = 32  # pixels: 16 regions of the small CNN
SEEDS = {"icons": 1}  # of the split [0]
HELD_OUT = {"icons": (500, 1000), "openclipart": (200, 500), "stamps": (100, 200)}  # about so many for dev, test
CAPTIONS = {"icons": 2, "icons_split1": 2, "openclipart": 1, "stamps": 1, "emoji": 5, "scenes": 5, "synthetic": 1}
DATA = tuple(CAPTIONS)


def prepare(data: str, cache: Path) -> Path:
    """The folder of a named data set, made if it is not there; for a path, the path itself.

    Raises:
        ValueError: neither a name nor a folder.
        RuntimeError: a package's client failed.
    """
    if data not in DATA:
        if not Path(data).is_dir():
            raise ValueError(f"--data: expected one of {', '.join(DATA)} or a folder, got {data!r}")
        return Path(data)
    if data == "emoji":
        from emoji_pairs import prepare_emoji_pairs  # examples/, which sources puts on the path

        return prepare_emoji_pairs(cache)
    if data == "scenes":  # not those of the script's default data, whose test split was read
        from emoji_scenes import Recipe, prepare_emoji_scenes

        return prepare_emoji_scenes(cache, recipe=Recipe(train=2500, dev=500, test=1000, seed=1))
    folder = cache / f"{data}-pairs"
    if not (folder / "whole").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if data == "synthetic":
            synthetic.write(folder)
        else:
            _write_source(data, cache, folder)
        (folder / "whole").touch()
    return folder


def prepare_pixels(data: str, cache: Path) -> Path:
    """:func:`prepare`, and beside the features ``{split}_pixels.npy`` (n, 32, 32, 3) uint8, made if they are not there.

    Raises:
        ValueError, RuntimeError: as :func:`prepare`; or a data set without pictures of its own.
    """
    folder = prepare(data, cache)
    names = ("train", "dev", "test")
    if data not in DATA or all((folder / f"{name}_pixels.npy").is_file() for name in names):
        return folder
    source = data.removesuffix("_split1")
    if source not in sources.SOURCES:
        raise ValueError(f"--encoders trainable: expected one of {', '.join(sources.SOURCES)} or a folder, got {data}")
    paths = {p.name: p.path for p in sources.SOURCES[source](cache)}
    for name in names:
        listed = (folder / f"{name}_names.txt").read_text(encoding="utf-8").splitlines()
        np.save(folder / f"{name}_pixels.npy", np.stack([_draw(paths[x], SMALL) for x in listed]))
    return folder


def _write_source(data: str, cache: Path, folder: Path) -> None:
    source = data.removesuffix("_split1")  # the first split of the icons, which decisions were made on
    pictures = [p for p in sources.SOURCES[source](cache) if _can_be_drawn(p.path)]
    features = np.concatenate(list(_feature_maps([p.path for p in pictures])))  # [n, 9, 1280]
    listing = families.SPLITS / f"{data}.txt"
    if not listing.is_file():
        groups = families.group([p.stem for p in pictures], [p.captions for p in pictures], features.mean(axis=1))
        dev, test = HELD_OUT[source]
        names = [p.name for p in pictures]
        read = families.read_before(names, families.SPLITS / "read" / f"{data}.txt")
        drawn = families.split(groups, dev=dev, test=test, seed=SEEDS.get(data, 0), read=read)
        families.write(listing, names, drawn)
    splits = families.read(listing, [p.name for p in pictures])
    for name in ("train", "dev", "test"):
        chosen = np.flatnonzero(splits == name)
        np.save(folder / f"{name}_ims.npy", features[chosen])
        captions = [caption for i in chosen for caption in pictures[i].captions]
        (folder / f"{name}_caps.txt").write_text("\n".join(captions) + "\n", encoding="utf-8")
        (folder / f"{name}_names.txt").write_text("\n".join(pictures[i].name for i in chosen) + "\n", encoding="utf-8")


def _feature_maps(paths: list[Path]):  # type: ignore[no-untyped-def]
    import emoji_features

    draw = emoji_features.draw
    emoji_features.draw = _draw
    try:
        yield from emoji_features.feature_maps(paths, SIZE)
    finally:
        emoji_features.draw = draw


def _can_be_drawn(path: Path) -> bool:
    """False for the few SVG files without a size, which the renderer refuses."""
    if path.suffix != ".svg":
        return True
    try:
        _draw(path, 8)
    except ValueError:
        return False
    return True


def _draw(path: Path, size: int) -> np.ndarray:
    """Like the examples' ``draw``, of PNG files as well."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # some clip-art is huge; it comes from a package that was chosen

    if path.suffix == ".svg":
        import io

        import resvg_py

        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=size, height=size))))
    else:
        drawing = Image.open(path)
    drawing = drawing.convert("RGBA")
    drawing.thumbnail((size, size))
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return np.asarray(picture.convert("RGB"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make a data set's folder.")
    parser.add_argument("data", choices=DATA, nargs="+")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/hrem-layers/evidence"))
    arguments = parser.parse_args()
    for data in arguments.data:
        folder = prepare(data, arguments.cache_dir.expanduser())
        counts = {s: len(np.load(folder / f"{s}_ims.npy", mmap_mode="r")) for s in ("train", "dev", "test")}
        print(f"{folder}: images {counts}")


if __name__ == "__main__":
    main()
