"""The example's default data: captions are the sources' words, no concept is on both sides of the split."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import emoji_pairs
import numpy as np
import pytest
from data_cache import is_whole
from emoji_captions import (
    CAPTIONS,
    Captioned,
    Emoji,
    bag,
    caption_all,
    choose_captions,
    clean,
    concept,
    find_families,
    neutral,
    read_emojis,
    split_families,
)
from emoji_features import DRAWINGS, feature_shape, require_packages
from emoji_pairs import Recipe, check_split, choose_drawings, prepare_emoji_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from pair_data import load_pairs
from text_tokens import words

WORD = st.text("abcdef", min_size=2, max_size=3)
PHRASE = st.lists(WORD, min_size=1, max_size=2).map(" ".join)
FAMILY_SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=40)


def emoji(name: str, *keywords: str, code: str = "0", category: str = "Objects", subcategory: str = "") -> Emoji:
    return Emoji(code, category, subcategory, (name,), keywords)


# ---------------------------------------------------------------------------------------- captions
@pytest.mark.parametrize(
    ("written", "cleaned"),
    [(":ten_o’clock:", "ten o'clock"), ("Gyōza-plate", "gyoza plate"), (":D", "d"), ("--", ""), ("boncuğu", "boncugu")],
)
def test_clean(written: str, cleaned: str) -> None:
    assert clean(written) == cleaned


@given(st.text(max_size=12))
@settings(max_examples=60)
def test_cleaned_text_stays_as_it_is_and_its_words_are_those_the_encoder_sees(text: str) -> None:
    assert clean(clean(text)) == clean(text)
    assert words(clean(text)) == clean(text).split()


def test_captions_are_names_and_then_keywords_dealt_from_the_rarest_on() -> None:
    frequency = Counter({"food": 90, "italy": 3, "slice": 2, "party": 20, "cheese": 5, "pizza": 1, "pepperoni": 1})
    captions = choose_captions(["pizza", "slice of pizza"], frequency, frequency)
    # new are: pepperoni, italy, cheese, party, food; "pizza" and "slice" are said by the names
    assert captions == (
        "pizza",
        "slice of pizza",
        "pepperoni party italy cheese",
        "italy food cheese party",
        "cheese party food pepperoni",
    )


@given(
    st.lists(PHRASE, min_size=1, max_size=4),
    st.lists(PHRASE, max_size=12),
    st.dictionaries(PHRASE, st.integers(0, 9)),
    st.frozensets(PHRASE.map(bag), max_size=5),
)
def test_five_captions_of_the_given_words_or_none(names, keywords, frequency, taken) -> None:
    captions = choose_captions(names, keywords, Counter(frequency), taken)
    assert captions == choose_captions(names, keywords[::-1], Counter(frequency), taken)
    if captions is None:
        return
    assert len(captions) == CAPTIONS == len({bag(c) for c in captions})
    assert not {bag(c) for c in captions} & taken
    for caption in captions:  # a name as it is, or whole keywords one after the other
        rest = caption
        while rest and rest not in names:
            first = next(k for k in sorted(keywords, key=len, reverse=True) if f"{rest} ".startswith(f"{k} "))
            rest = rest[len(first) :].lstrip()


def test_too_few_keywords_give_no_captions() -> None:
    assert choose_captions(["bed"], ["rest", "hotel"], Counter()) is None
    assert choose_captions(["bed"], ["rest", "hotel", "room"], Counter()) is not None
    assert choose_captions(["bed", "bunk", "cot"], ["bed", "12", "x", "3d"], Counter()) is None


def test_a_name_is_no_second_name_of_another_emoji_and_no_caption_is_used_twice() -> None:
    keywords = ("puppy", "woof", "pet", "nature", "faithful", "friend")
    face = Emoji("1", "", "", ("dog face", "hound"), keywords)
    dog = Emoji("2", "", "", ("hound", "dog"), keywords)
    table = caption_all([face, dog])
    assert [row.emoji for row in table] == [face, dog]
    assert table[0].captions[0] == "dog face" and "hound" not in table[0].captions
    assert table[1].captions[:2] == ("hound", "dog")
    bags = [bag(c) for row in table for c in row.captions]
    assert len(set(bags)) == len(bags) == 2 * CAPTIONS


# ---------------------------------------------------------------------------------------- families
@pytest.mark.parametrize(
    ("variant", "without"),
    [
        ("1f468-200d-1f373", "1f9d1-200d-1f373"),
        ("1f469-200d-1f373", "1f9d1-200d-1f373"),
        ("1f9d7-200d-2640", "1f9d7"),
        ("1f436", "1f436"),
    ],
)
def test_neutral(variant: str, without: str) -> None:
    assert neutral(variant) == without == neutral(without)


@pytest.mark.parametrize(
    "names",
    [
        ["red heart", "green hearts", "black heart"],
        ["dog", "dog face"],
        ["person running", "woman running facing right"],
        ["man", "old woman", "baby"],
        ["closed book", "open book", "books"],
        ["backhand index pointing left", "backhand index pointing up"],
        ["bus", "oncoming bus"],
    ],
)
def test_variants_are_one_concept(names: list[str]) -> None:
    assert len({concept(emoji(name)) for name in names}) == 1


def test_concepts_that_need_the_category() -> None:
    assert concept(emoji("new moon face", category="Travel & Places")) == concept(
        emoji("waxing crescent moon", category="Travel & Places")
    )
    assert concept(emoji("moon cake", category="Food & Drink")) != "moon"
    assert concept(emoji("grinning cat", subcategory="cat-face")) == concept(emoji("grinning face"))
    assert len({concept(emoji(name)) for name in ("fox", "cat", "bus", "glass", "grass")}) == 5


def captioned(name: str, *captions: str) -> Captioned:
    return Captioned(emoji(name), captions)


def test_families_by_concept_by_words_and_through_one_another() -> None:
    table = [
        captioned("red heart", "a b c d"),
        captioned("trumpet", "brass music jazz"),
        captioned("blue heart", "e f g h"),
        captioned("horn", "brass music loud jazz"),  # 3 of 4 words in common with the trumpet
        captioned("bed", "e f g h i"),  # 4 of 5 in common with the blue heart
        captioned("drum", "brass stick loud jam"),  # 2 of 6 in common with the horn
    ]
    assert find_families(table) == [[0, 2, 4], [1, 3], [5]]
    assert find_families(table, overlap=1 / 3) == [[0, 2, 4], [1, 3, 5]]


@given(st.lists(st.tuples(PHRASE, PHRASE), max_size=25))
def test_families_part_the_table_and_hold_what_belongs_together(rows) -> None:
    table = [captioned(name, caption) for name, caption in rows]
    families = find_families(table)
    assert sorted(i for family in families for i in family) == list(range(len(table)))
    of = {i: number for number, family in enumerate(families) for i in family}
    for i, a in enumerate(table):
        for j, b in enumerate(table[:i]):
            if concept(a.emoji) == concept(b.emoji) or bag(a.captions[0]) == bag(b.captions[0]):
                assert of[i] == of[j]


# ---------------------------------------------------------------------------------------- the split
@given(FAMILY_SIZES, st.integers(1, 10), st.integers(1, 10), st.integers(0, 3))
def test_split_keeps_families_whole(sizes: list[int], dev: int, test: int, seed: int) -> None:
    rows = iter(range(sum(sizes)))
    families = [[next(rows) for _ in range(size)] for size in sizes]
    try:
        split = split_families(families, dev=dev, test=test, seed=seed)
    except ValueError:
        assert sum(size for size in sizes if size <= 3) < dev + 2 + test + 2 + 1
        return
    assert split == split_families(families, dev=dev, test=test, seed=seed)
    assert sorted(row for chosen in split.values() for row in chosen) == list(range(sum(sizes)))
    assert dev <= len(split["dev"]) <= dev + 2 and test <= len(split["test"]) <= test + 2 and split["train"]
    side = {row: name for name, chosen in split.items() for row in chosen}
    for family in families:
        assert len({side[row] for row in family}) == 1
        assert len(family) <= 3 or side[family[0]] == "train"


def test_split_depends_on_the_seed_and_says_when_there_is_too_little() -> None:
    families = [[i] for i in range(40)]
    splits = [split_families(families, dev=5, test=5, seed=seed)["test"] for seed in range(5)]
    assert len(set(map(tuple, splits))) == 5
    with pytest.raises(ValueError, match=r"5 test, 5 dev and some training emoji, got 10 families of 10 emoji"):
        split_families(families[:10], dev=5, test=5, seed=0)


def test_check_split_finds_a_caption_on_two_sides() -> None:
    table = [Captioned(emoji("a", code="1"), ("sea blue", "x")), Captioned(emoji("b", code="2"), ("y", "blue sea"))]
    check_split(table, {"train": [0, 1], "test": []})
    with pytest.raises(ValueError, match=r"in train and test"):
        check_split(table, {"train": [0], "test": [1]})


def test_training_has_both_drawings_and_the_others_one_each() -> None:
    assert [tuple(i) for i in choose_drawings("train", [3, 7])] == [(r, d) for r in (3, 7) for d in DRAWINGS]
    for split in ("dev", "test"):
        chosen = choose_drawings(split, [1, 2, 5, 6])
        assert [i.row for i in chosen] == [1, 2, 5, 6]
        assert Counter(i.drawing for i in chosen) == dict.fromkeys(DRAWINGS, 2)


# ---------------------------------------------------------------------------------------- the cache
@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Replaces the making of the data by that of one small file; lists the folders it was done in."""
    done: list[Path] = []

    def build(folder: Path, recipe: Recipe, made_from: dict, *, progress: bool) -> None:
        done.append(folder)
        (folder / "data").write_text("12345")
        if recipe.seed == 13:
            raise KeyboardInterrupt
        (folder / "metadata.json").write_text(json.dumps({**made_from, "files": {"data": 5}}))

    monkeypatch.setattr(emoji_pairs, "build", build)
    monkeypatch.setattr(emoji_pairs, "require_packages", lambda **_: None)
    monkeypatch.setattr(emoji_pairs, "package_versions", lambda: {"emoji": "2"})
    return done


def test_a_finished_folder_is_used_again(tmp_path: Path, builds: list[Path]) -> None:
    folder = prepare_emoji_pairs(tmp_path / "new" / "cache")
    assert prepare_emoji_pairs(tmp_path / "new" / "cache") == folder and len(builds) == 1
    assert builds[0] != folder and builds[0].parent == folder.parent and list(folder.parent.iterdir()) == [folder]


def test_another_recipe_or_other_packages_make_another_folder(tmp_path, builds, monkeypatch) -> None:
    first = prepare_emoji_pairs(tmp_path)
    second = prepare_emoji_pairs(tmp_path, recipe=Recipe(seed=1))
    monkeypatch.setattr(emoji_pairs, "package_versions", lambda: {"emoji": "3"})
    third = prepare_emoji_pairs(tmp_path)
    assert len({first, second, third}) == 3 == len(builds) and first.is_dir()


@pytest.mark.parametrize("damage", ["shorter", "gone", "no metadata", "other metadata"])
def test_a_damaged_folder_is_made_anew(tmp_path: Path, builds: list[Path], damage: str) -> None:
    folder = prepare_emoji_pairs(tmp_path)
    metadata = folder / "metadata.json"
    if damage == "shorter":
        (folder / "data").write_text("1")
    elif damage == "gone":
        (folder / "data").unlink()
    elif damage == "no metadata":
        metadata.write_text(metadata.read_text()[:20])
    else:
        metadata.write_text(metadata.read_text().replace('"seed": 0', '"seed": 5'))
    assert prepare_emoji_pairs(tmp_path) == folder and len(builds) == 2
    assert (folder / "data").read_text() == "12345" and list(tmp_path.iterdir()) == [folder]


def test_an_interrupted_run_leaves_no_folder_that_would_be_taken_for_finished(tmp_path, builds) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare_emoji_pairs(tmp_path, recipe=Recipe(seed=13))
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_at_once_the_slower_takes_what_the_faster_made(tmp_path, builds, monkeypatch) -> None:
    slow_build, made = emoji_pairs.build, []

    def build_and_be_overtaken(folder: Path, *args: object, **options: object) -> None:
        slow_build(folder, *args, **options)
        monkeypatch.setattr(emoji_pairs, "build", slow_build)
        made.append(prepare_emoji_pairs(tmp_path))

    monkeypatch.setattr(emoji_pairs, "build", build_and_be_overtaken)
    assert [prepare_emoji_pairs(tmp_path)] == made and len(builds) == 2
    assert list(tmp_path.iterdir()) == made


# ---------------------------------------------------------------------------------------- the packages
def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "resvg_py" else object())
    with pytest.raises(ImportError, match=r'needs resvg-py: pip install "hrem-layers\[examples\]"'):
        require_packages()


@pytest.mark.parametrize("size", [0, -32, 100])
def test_the_picture_size_is_a_multiple_of_the_stride(size: int) -> None:
    assert feature_shape(192) == (36, 1280)
    with pytest.raises(ValueError, match=rf"image_size: expected a positive multiple of 32, got {size}"):
        feature_shape(size)


@pytest.fixture(scope="module")
def packages() -> None:
    # not importorskip: the packages that are only folders of files to us need not be importable
    try:
        require_packages(network=True)
    except ImportError as error:
        pytest.skip(str(error))


def test_the_whole_table_is_split_without_a_leak(packages: None) -> None:
    table = caption_all(read_emojis())
    families = find_families(table)
    assert len(table) > 900 and len(families) > 750
    recipe = Recipe()
    rows = split_families(families, dev=recipe.dev, test=recipe.test, seed=recipe.seed)
    check_split(table, rows)
    assert len(rows["test"]) >= 150 and len(rows["train"]) >= 600
    side = {table[row].emoji.code: name for name, chosen in rows.items() for row in chosen}
    assert not any(skin in code for code in side for skin in ("1f3fb", "1f3fd", "1f3ff"))
    assert "1f9d1-200d-1f373" in side and not {"1f468-200d-1f373", "1f469-200d-1f373"} & side.keys()  # cook
    variants = ["1f436 1f415", "1f499 1f49a 1f49c", "1f4d6 1f4d7 1f4da", "1f311 1f312 1f31a", "1f603 1f63a"]
    for codes in map(str.split, variants):
        assert len({side[code] for code in codes}) == 1, codes
    assert {row.captions[0] for row in table} >= {"pizza", "guitar", "giraffe"}


def test_a_handful_of_emoji_become_a_data_folder(packages: None, tmp_path: Path) -> None:
    recipe = Recipe(image_size=64, test=4, dev=3, limit=40)
    folder = prepare_emoji_pairs(tmp_path, progress=False, recipe=recipe)
    metadata = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    pairs = {split: load_pairs(folder, split) for split in ("train", "dev", "test")}
    assert {split: p.num_images for split, p in pairs.items()} == metadata["images"]
    assert all(p.features.shape[1:] == (4, 1280) and p.rows_per_image == 1 for p in pairs.values())

    images = [line.split("\t") for line in (folder / "test_images.tsv").read_text(encoding="utf-8").splitlines()]
    assert [name for _, _, name in images] == pairs["test"].captions[::CAPTIONS]
    pictures = np.load(folder / "test_pictures.npy")
    assert pictures.shape == (len(images), 72, 72, 3) and pictures.dtype == np.uint8
    assert (pictures[:, 0, 0] == 255).all() and (pictures.reshape(len(images), -1).std(axis=1) > 20).all()
    listed = [line.split("\t")[:2] for line in (folder / "train_images.tsv").read_text(encoding="utf-8").splitlines()]
    assert [code for code, _ in listed[::2]] == [code for code, _ in listed[1::2]]
    assert [name for _, name in listed] == [*DRAWINGS] * (len(listed) // 2)
    train = np.array(pairs["train"].features.array)
    assert (train[::2] != train[1::2]).any(axis=(1, 2)).all()  # two drawings

    with np.load(folder / "word_vectors.npz") as vectors:
        known, table = set(vectors["words"].tolist()), vectors["vectors"]
    assert known == {word for p in pairs.values() for caption in p.captions for word in words(caption)}
    assert table.shape == (len(known), 256) and table.dtype == np.float32 and np.isfinite(table).all()

    before = (folder / "metadata.json").stat().st_mtime_ns
    assert prepare_emoji_pairs(tmp_path, progress=False, recipe=recipe) == folder
    assert (folder / "metadata.json").stat().st_mtime_ns == before and is_whole(folder, {"recipe": metadata["recipe"]})
