"""Single emoji with what people call them, families of like ones kept on one side of the split.

    python examples/emoji_pairs.py --cache-dir ~/.cache/hrem-layers

writes a folder in the precomputed form that flickr30k.py reads (--data-dir), and benchmarks/evidence too. It is harder
than the default data, emoji_scenes.py: all that dev and test show are concepts that training never saw.


    {train,dev,test}_ims.npy      (n, 16, 1280) float32: the 4 x 4 cells of an ImageNet network's feature map
    {train,dev,test}_caps.txt     five captions per image
    {train,dev,test}_images.tsv   code points, drawing and name of each image
    test_pictures.npy             (n, 72, 72, 3) uint8: the test images themselves
    word_vectors.npz              words, vectors: pretrained vectors of all words in the captions
    metadata.json                 how it was made

These are drawings and keywords, not photographs and sentences: enough to see that everything works and learns
(the emoji of dev and test are concepts that training never saw), not to compare methods.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_cache import made_once, write_metadata
from emoji_captions import Captioned, bag, caption_all, find_families, read_emojis, split_families
from emoji_features import (
    DRAWINGS,
    NETWORK,
    PACKAGES,
    draw,
    feature_maps,
    feature_shape,
    find_drawings,
    require_packages,
    word_vectors,
)
from text_tokens import words

LICENCES = {
    "twemoji": "Twemoji, copyright Twitter, Inc and other contributors, CC BY 4.0",
    "openmoji": "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0",
}
FAMILY_RULE = (
    "Of man, woman and person only the neutral emoji; no skin tones, flags or symbols. One family: equal names but "
    "for sex, age, colour, direction, open or closed, 'face', plural; or captions that have half of their words in "
    "common. A family is on one side of the split, with both drawings."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the data depends on besides the packages. ``limit``: only the first so many emoji (for tests)."""

    image_size: int = 128
    test: int = 200
    dev: int = 100
    seed: int = 0
    limit: int | None = None


class Image(NamedTuple):
    row: int  # of the table of emoji
    drawing: str


def prepare_emoji_pairs(cache_dir: Path, *, progress: bool = True, recipe: Recipe | None = None) -> Path:
    """Returns the data folder in ``cache_dir``; makes it (some 20 s on two idle cores) if it is not there yet.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
    """
    recipe = recipe or Recipe()
    require_packages(network=True)
    made_from = {"recipe": dataclasses.asdict(recipe), "format": 1, "packages": package_versions()}
    return made_once(
        cache_dir, "emoji-pairs", made_from, lambda folder: build(folder, recipe, made_from, progress=progress)
    )


def package_versions() -> dict[str, str]:
    return {
        name: importlib.metadata.version(name)
        for name in sorted({*PACKAGES.values(), *NETWORK.values(), "torch"} - {"tqdm"})
    }


def build(folder: Path, recipe: Recipe, made_from: dict[str, Any], *, progress: bool) -> None:
    """Writes the whole data folder."""
    from tqdm import tqdm

    drawings = find_drawings()
    emojis = [e for e in read_emojis() if all(e.code in drawings[name] for name in DRAWINGS)]
    table = caption_all(emojis)[: recipe.limit]
    families = find_families(table)
    rows = split_families(families, dev=recipe.dev, test=recipe.test, seed=recipe.seed)
    check_split(table, rows)
    images = {split: choose_drawings(split, chosen) for split, chosen in rows.items()}
    with tqdm(
        total=sum(map(len, images.values())),
        desc="emoji features",
        unit="image",
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for split, chosen in images.items():
            write_split(folder, split, chosen, table, drawings, recipe.image_size, bar)
    pictures = np.stack([draw(drawings[i.drawing][table[i.row].emoji.code], 72) for i in images["test"]])
    np.save(folder / "test_pictures.npy", pictures)
    said = {word for row in table for caption in row.captions for word in words(caption)}
    listed, vectors = word_vectors(said)
    np.savez(folder / "word_vectors.npz", words=listed, vectors=vectors)
    metadata = {
        **made_from,
        "images": {split: len(chosen) for split, chosen in images.items()},
        "emoji": {split: len(chosen) for split, chosen in rows.items()},
        "families": len(families),
        "left_out_for_want_of_captions": len(emojis) - len(table) if recipe.limit is None else None,
        "family_rule": FAMILY_RULE,
        "word_vectors": "WordLlama l2_supercat 256; of the words of all splits, none of them trained on these captions",
        "licences": LICENCES,
    }
    write_metadata(folder, metadata)


def choose_drawings(split: str, rows: list[int]) -> list[Image]:
    """Both drawings of each emoji in training; in dev and test one, each set in turn.

    With both there would be two images to each caption, and right and wrong answers could not be told apart.
    """
    if split == "train":
        return [Image(row, drawing) for row in rows for drawing in DRAWINGS]
    return [Image(row, DRAWINGS[place % len(DRAWINGS)]) for place, row in enumerate(rows)]


def check_split(table: list[Captioned], rows: dict[str, list[int]]) -> None:
    """Raises ValueError if an emoji or a caption (its words, in any order) is in two splits."""
    seen: dict[Any, str] = {}
    for split, chosen in rows.items():
        for row in chosen:
            for key in (table[row].emoji.code, *map(bag, table[row].captions)):
                if seen.setdefault(key, split) != split:
                    raise ValueError(f"split: expected {key} on one side, got it in {seen[key]} and {split}")


def write_split(
    folder: Path,
    split: str,
    images: list[Image],
    table: list[Captioned],
    drawings: dict[str, dict[str, Path]],
    image_size: int,
    bar: Any,
) -> None:
    """Writes the features, captions and lists of one split; ``bar.update`` is told of every image."""
    files = [drawings[image.drawing][table[image.row].emoji.code] for image in images]
    shape = (len(images), *feature_shape(image_size))
    features = np.lib.format.open_memmap(folder / f"{split}_ims.npy", "w+", dtype=np.float32, shape=shape)
    done = 0
    for maps in feature_maps(files, image_size):
        features[done : done + len(maps)] = maps
        done += len(maps)
        bar.update(len(maps))
    features.flush()
    with (folder / f"{split}_caps.txt").open("w", encoding="utf-8", newline="\n") as captions:
        for image in images:
            captions.writelines(f"{caption}\n" for caption in table[image.row].captions)
    with (folder / f"{split}_images.tsv").open("w", encoding="utf-8", newline="\n") as listing:
        for image in images:
            emoji = table[image.row].emoji
            listing.write(f"{emoji.code}\t{image.drawing}\t{emoji.names[0]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the example's default data: emoji and their captions.")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/hrem-layers"), help="where to [%(default)s]")
    folder = prepare_emoji_pairs(parser.parse_args().cache_dir)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    print(f"{folder}: images {metadata['images']}, emoji {metadata['emoji']}, {metadata['families']} families")


if __name__ == "__main__":
    main()
