"""The example's default data, made without a download: pictures of two to four things, and what people call them.

    python examples/emoji_scenes.py --cache-dir ~/.cache/hrem-layers

The things are emoji of animals, plants and food, drawn by two groups of artists and named by many people in packages
that pip installs. A scene puts a few of them beside one another, each by either artist, turned and scaled at random;
its captions join what people call them. The folder has the precomputed form that flickr30k.py reads, with ragged
regions in float16:

    {train,dev,test}_ims.npy      (n, 4, 704) float16: a row per thing, as a faultless detector would find them
    {train,dev,test}_lengths.npy  (n,): how many things there are
    {train,dev,test}_caps.txt     five captions per image
    {train,dev,test}_scenes.tsv   code points and drawing of each thing
    test_pictures.npy             (n, 128, 128, 3) uint8: the test images themselves
    word_vectors.npz              words, vectors: pretrained vectors of all words in the captions
    metadata.json                 how it was made, what the splits share, and whose the art is

No two things of a scene stand together in a scene of another split: what is tested is to understand new scenes of
known things. What the splits share is said in ``SHARED``; emoji_pairs.py makes data whose things are new as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import random
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from data_cache import made_once, write_metadata
from drawing_features import FEATURES, SIZE, describe
from emoji_captions import Captioned, caption_all, read_emojis
from emoji_features import DRAWINGS, PACKAGES, draw, find_drawings, require_packages, word_vectors
from text_tokens import words

FEWEST, MOST = 2, 4  # things in a scene
CAPTIONS = 5
CATEGORIES = ("Animals & Nature", "Food & Drink")  # things that can be told apart when they are turned
PICTURE = 2 * SIZE
TURN, SCALE = 25.0, (0.65, 1.0)  # degrees to either side; of the drawing's size
SHARED = (
    "No two things of a scene stand together in a scene of another split, and each is turned, scaled and drawn anew. "
    "Shared by the splits: the emoji, both drawings of each, and the words for them."
)
ATTRIBUTION = (
    "Art: Twemoji, copyright Twitter, Inc and other contributors (CC BY 4.0); OpenMoji, the open-source emoji and icon "
    "project (CC BY-SA 4.0); scenes composed of them here (CC BY-SA 4.0)."
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What the data depends on besides the packages. ``limit``: only the first so many emoji (for tests)."""

    train: int = 2500
    dev: int = 200
    test: int = 500
    seed: int = 0
    limit: int | None = None


class Scene(NamedTuple):
    things: tuple[tuple[int, int], ...]  # a row of the table of emoji, and which of its drawings
    captions: tuple[str, ...]


def prepare_emoji_scenes(cache_dir: Path, *, progress: bool = True, recipe: Recipe | None = None) -> Path:
    """Returns the data folder in ``cache_dir``; makes it (some 15 s) if it is not there yet.

    Raises:
        ImportError: a package is missing; the message has the command that installs it.
    """
    recipe = recipe or Recipe()
    require_packages()
    versions = {name: importlib.metadata.version(name) for name in sorted({*PACKAGES.values()} - {"tqdm"})}
    made_from = {"recipe": dataclasses.asdict(recipe), "format": 4, "packages": versions}
    return made_once(
        cache_dir, "emoji-scenes", made_from, lambda folder: build(folder, recipe, made_from, progress=progress)
    )


def build(folder: Path, recipe: Recipe, made_from: dict[str, Any], *, progress: bool) -> None:
    """Writes the whole data folder."""
    drawings = find_drawings()
    emojis = [e for e in read_emojis() if all(e.code in drawings[name] for name in DRAWINGS)]
    table = [row for row in caption_all(emojis) if row.emoji.category in CATEGORIES][: recipe.limit]
    drawn = _draw_all([drawings[name][row.emoji.code] for row in table for name in DRAWINGS], progress)
    scenes = compose_splits(table, {"test": recipe.test, "dev": recipe.dev, "train": recipe.train}, recipe.seed)
    scale: tuple[np.ndarray, np.ndarray] | None = None
    for place, split in enumerate(("train", "dev", "test")):
        chosen = [len(DRAWINGS) * thing + d for scene in scenes[split] for thing, d in scene.things]
        pictures = turn(drawn[chosen], [recipe.seed, place])
        features = describe(pictures)
        scale = scale or (features.mean(axis=0), features.std(axis=0) + 1e-3)  # of the training pictures
        _write_split(folder, split, scenes[split], table, (features - scale[0]) / scale[1])
        if split == "test":
            ends = np.cumsum([len(scene.things) for scene in scenes[split]])
            np.save(folder / "test_pictures.npy", np.stack([paste(x) for x in np.split(pictures, ends[:-1])]))
    said = {word for made in scenes.values() for scene in made for caption in scene.captions for word in words(caption)}
    listed, vectors = word_vectors(said)
    np.savez(folder / "word_vectors.npz", words=listed, vectors=vectors)
    write_metadata(
        folder,
        {
            **made_from,
            "images": {split: len(made) for split, made in scenes.items()},
            "emoji": len(table),
            "shared": SHARED,
            "attribution": ATTRIBUTION,
            "word_vectors": "WordLlama l2_supercat 256; none of them trained on these captions",
        },
    )


def _draw_all(files: Sequence[Path], progress: bool) -> np.ndarray:
    from tqdm import tqdm

    shown = tqdm(files, desc="drawing emoji", unit="drawing", disable=not (progress and sys.stderr.isatty()))
    return np.stack([draw(path, SIZE) for path in shown])


def turn(drawn: np.ndarray, seed: Sequence[int]) -> np.ndarray:
    """(n, S, S, 3) uint8 on white -> the same, each turned and scaled at random and put at a random place."""
    from PIL import Image

    draws = np.random.default_rng(seed)
    out = np.full_like(drawn, 255)
    for i, picture in enumerate(drawn):
        side = round(SIZE * draws.uniform(*SCALE))
        small = Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR)
        angle = draws.uniform(-TURN, TURN)
        turned = small.rotate(angle, Image.Resampling.BILINEAR, fillcolor=(255, 255, 255))
        top, left = draws.integers(0, SIZE - side + 1, 2)
        out[i, top : top + side, left : left + side] = np.asarray(turned)
    return out


def compose_splits(table: Sequence[Captioned], sizes: dict[str, int], seed: int) -> dict[str, list[Scene]]:
    """So many scenes for each split; two things that stand together in one split do so in no other.

    Raises:
        ValueError: there are too few emoji for so many.
    """
    draws = random.Random(seed)
    taken: dict[tuple[int, ...], str] = {}
    splits: dict[str, list[Scene]] = {split: [] for split in sizes}
    for split, size in sizes.items():
        tries = 100 * size + 100
        while len(splits[split]) < size:
            tries -= 1
            if tries < 0 or len(table) < MOST:
                raise ValueError(f"table: expected enough emoji for {sizes} scenes, got {len(table)}")
            things = tuple(draws.sample(range(len(table)), draws.randint(FEWEST, MOST)))
            together = list(combinations(sorted(things), 2))
            if any(taken.get(pair, split) != split for pair in together):
                continue
            taken.update(dict.fromkeys(together, split))
            drawn = tuple((thing, draws.randrange(len(DRAWINGS))) for thing in things)
            splits[split].append(Scene(drawn, captions_of(things, table, draws)))
    return splits


def captions_of(things: Sequence[int], table: Sequence[Captioned], draws: random.Random) -> tuple[str, ...]:
    """Five captions; each names the things in an order of its own, and every second leaves one of three or four out.

    Every caption of an emoji is used once per scene.
    """
    dealt = [draws.sample(table[row].captions, CAPTIONS) for row in things]
    lines = []
    for k in range(CAPTIONS):
        order = draws.sample(range(len(things)), len(things))
        if len(order) > FEWEST and k % 2:
            order.pop()
        lines.append(" and ".join(dealt[i][k] for i in order))
    return tuple(lines)


def paste(things: np.ndarray) -> np.ndarray:
    """(t, S, S, 3) uint8, up to four -> (2S, 2S, 3): in rows of two, on white; a row of one is centred."""
    canvas = np.full((PICTURE, PICTURE, 3), 255, np.uint8)
    rows = [things[i : i + 2] for i in range(0, len(things), 2)]
    top = (PICTURE - SIZE * len(rows)) // 2
    for r, row in enumerate(rows):
        left = (PICTURE - SIZE * len(row)) // 2
        for c, thing in enumerate(row):
            canvas[top + r * SIZE :, left + c * SIZE :][:SIZE, :SIZE] = thing
    return canvas


def _write_split(
    folder: Path, split: str, scenes: Sequence[Scene], table: Sequence[Captioned], features: np.ndarray
) -> None:
    lengths = np.array([len(scene.things) for scene in scenes])
    regions = np.zeros((len(scenes), MOST, FEATURES), np.float16)
    regions[np.arange(MOST) < lengths[:, None]] = features
    np.save(folder / f"{split}_ims.npy", regions)
    np.save(folder / f"{split}_lengths.npy", lengths)
    lines = {
        "caps.txt": ["\n".join(scene.captions) for scene in scenes],
        "scenes.tsv": ["\t".join(f"{table[t].emoji.code} {DRAWINGS[d]}" for t, d in scene.things) for scene in scenes],
    }
    for name, content in lines.items():
        (folder / f"{split}_{name}").write_text("\n".join(content) + "\n", encoding="utf-8", newline="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the example's default data: scenes of emoji, with captions.")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/hrem-layers"), help="where to [%(default)s]")
    folder = prepare_emoji_scenes(parser.parse_args().cache_dir)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    print(f"{folder}: images {metadata['images']} of {metadata['emoji']} emoji. {metadata['shared']}")


if __name__ == "__main__":
    main()
