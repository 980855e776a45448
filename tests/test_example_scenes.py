"""The example's default data: scenes of emoji, what its splits share, and their features."""

from __future__ import annotations

import json
import random
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from data_cache import is_whole
from drawing_features import FEATURES, SIZE, describe
from emoji_captions import Captioned, Emoji
from emoji_features import require_packages
from emoji_scenes import (
    CAPTIONS,
    FEWEST,
    MOST,
    PICTURE,
    Recipe,
    captions_of,
    compose_splits,
    paste,
    prepare_emoji_scenes,
    turn,
)
from hypothesis import given
from hypothesis import strategies as st
from pair_data import load_pairs

SIZES = {"test": 20, "dev": 10, "train": 40}


def make_table(count: int) -> list[Captioned]:
    return [
        Captioned(Emoji(f"{i:x}", "Things", "thing", (f"name{i}",), ()), tuple(f"t{i}c{k}" for k in range(CAPTIONS)))
        for i in range(count)
    ]


@given(seed=st.integers(0, 10**6))
def test_no_two_things_stand_together_in_two_splits(seed: int) -> None:
    splits = compose_splits(make_table(60), SIZES, seed)
    assert {split: len(scenes) for split, scenes in splits.items()} == SIZES
    together = {
        split: {pair for s in scenes for pair in combinations(sorted(thing for thing, _ in s.things), 2)}
        for split, scenes in splits.items()
    }
    for one, other in combinations(together.values(), 2):
        assert not one & other
    things = [[thing for thing, _ in s.things] for scenes in splits.values() for s in scenes]
    assert all(FEWEST <= len(set(t)) == len(t) <= MOST for t in things)
    assert {d for scenes in splits.values() for s in scenes for _, d in s.things} == {0, 1}


def test_too_few_emoji_are_named() -> None:
    with pytest.raises(ValueError, match=r"table: expected enough emoji for .* scenes, got 3"):
        compose_splits(make_table(3), SIZES, 0)
    with pytest.raises(ValueError, match="got 6"):
        compose_splits(make_table(6), SIZES, 0)


def test_captions_name_the_things_of_the_scene_and_each_is_used_once() -> None:
    table = make_table(9)
    lines = captions_of((1, 4, 7), table, random.Random(0))
    said = [line.split(" and ") for line in lines]
    assert [len(words) for words in said] == [3, 2, 3, 2, 3]
    every = [word for words in said for word in words]
    assert len(set(every)) == len(every) and {word[:2] for word in every} == {"t1", "t4", "t7"}
    assert [len(line.split(" and ")) for line in captions_of((2, 3), table, random.Random(0))] == [2] * CAPTIONS


def test_things_are_turned_and_stay_on_white() -> None:
    drawn = np.full((3, SIZE, SIZE, 3), 255, np.uint8)
    drawn[:, 16:48, 16:48] = 0
    turned = turn(drawn, [0, 1])
    assert (
        turned.shape == drawn.shape
        and (turned[:, 0, 0] == 255).all()
        and (turned != turned[:1]).any(axis=(1, 2, 3))[1:].all()
    )
    assert ((turned == 0).all(axis=3).sum(axis=(1, 2)) > 200).all()
    assert (turn(drawn, [0, 1]) == turned).all() and (turn(drawn, [0, 2]) != turned).any()


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_pictures_hold_all_things(count: int) -> None:
    things = np.stack([np.full((SIZE, SIZE, 3), value, np.uint8) for value in range(count)])
    picture = paste(things)
    assert picture.shape == (PICTURE, PICTURE, 3)
    assert [(picture == value).all(axis=2).sum() for value in range(count)] == [SIZE * SIZE] * count


def test_features_say_where_colours_are_and_which_way_edges_run() -> None:
    white = np.full((1, SIZE, SIZE, 3), 255, np.uint8)
    assert (describe(white)[0] == np.repeat([1.0, 0.0], [192, 512])).all()
    upright = white.copy()
    upright[:, :, SIZE // 2 + 4 :] = 0  # an edge inside of a cell
    edges = describe(upright)[0, 192:].reshape(8, 8, 8)
    assert (edges[:, 4, 0] > 0.9).all() and (edges.sum(axis=(0, 1)) > 0).tolist() == [True] + [False] * 7
    level = describe(upright.transpose(0, 2, 1, 3).copy())[0, 192:].reshape(8, 8, 8)
    np.testing.assert_array_equal(level[..., 4], edges[..., 0].T)


@pytest.mark.parametrize("wrong", [np.zeros((1, 32, 32, 3), np.uint8), np.zeros((1, SIZE, SIZE, 3), np.float32)])
def test_features_of_something_else_are_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"pictures: expected uint8 of shape \(n, 64, 64, 3\), got"):
        describe(wrong)


def test_a_handful_of_scenes_become_a_data_folder(tmp_path: Path) -> None:
    try:
        require_packages()
    except ImportError as error:
        pytest.skip(str(error))
    recipe = Recipe(train=8, dev=3, test=5, limit=60)
    folder = prepare_emoji_scenes(tmp_path, progress=False, recipe=recipe)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    pairs = {split: load_pairs(folder, split) for split in ("train", "dev", "test")}
    assert (
        {split: p.num_images for split, p in pairs.items()} == metadata["images"] == {"train": 8, "dev": 3, "test": 5}
    )
    for split, p in pairs.items():
        assert p.features.shape[1:] == (MOST, FEATURES) and p.features.array.dtype == np.float16
        scenes = (folder / f"{split}_scenes.tsv").read_text(encoding="utf-8").splitlines()
        assert [len(line.split("\t")) for line in scenes] == p.lengths.tolist()
        assert all(np.abs(p.image(i)).sum(axis=1).min() > 0 for i in range(p.num_images))
    pictures = np.load(folder / "test_pictures.npy")
    assert pictures.shape == (5, PICTURE, PICTURE, 3) and (pictures.reshape(5, -1).std(axis=1) > 10).all()
    assert "CC BY 4.0" in metadata["attribution"] and "CC BY-SA 4.0" in metadata["attribution"]
    assert prepare_emoji_scenes(tmp_path, progress=False, recipe=recipe) == folder
    assert is_whole(folder, {"recipe": metadata["recipe"]})
