"""Captions as token ids, for a BiGRU with a vocabulary of its own and for BERT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
PAD, UNKNOWN = 0, 1


def words(caption: str) -> list[str]:
    """Lower-case words without punctuation: ``"A dog's ball."`` -> a, dog's, ball."""
    return _WORD.findall(caption.lower())


class Vocabulary:
    """Words of the training captions; id 0 is padding, id 1 every other word.

    Args:
        known: the words, in the order of their ids from 2 on.
        augment: probability with which a word is masked, replaced or deleted in training.
    """

    def __init__(self, known: Iterable[str], *, augment: float) -> None:
        self.known = list(known)
        self.augment = augment
        self._ids = {word: place for place, word in enumerate(self.known, start=2)}

    @classmethod
    def of(cls, captions: Iterable[str], *, min_count: int, augment: float) -> Vocabulary:
        """The words that occur at least ``min_count`` times in ``captions``, sorted."""
        counts = Counter(word for caption in captions for word in words(caption))
        return cls(sorted(word for word, count in counts.items() if count >= min_count), augment=augment)

    def __len__(self) -> int:
        return len(self.known) + 2

    def __call__(self, caption: str, random: np.random.Generator | None) -> list[int]:
        """Ids of the words; with ``random`` (training) some of them changed. Never empty."""
        ids = [[self._ids.get(word, UNKNOWN)] for word in words(caption)] or [[UNKNOWN]]
        return augment_words(ids, random, self.augment, mask=UNKNOWN, draw=lambda r: int(r.integers(2, len(self))))


class BertTokens:
    """WordPiece ids by a tokenizer of the transformers library, between [CLS] and [SEP].

    Args:
        tokenizer: of the transformers library.
        augment: probability with which a word is masked, replaced or deleted in training.
        longest: how many ids the model has positions for, [CLS] and [SEP] among them; what is more is cut off.
            None = any number.
    """

    def __init__(self, tokenizer: Any, *, augment: float, longest: int | None = None) -> None:
        self.tokenizer, self.augment, self.longest = tokenizer, augment, longest

    def __call__(self, caption: str, random: np.random.Generator | None) -> list[int]:
        tokenizer = self.tokenizer
        changed = augment_words(
            self._pieces(caption),
            random,
            self.augment,
            mask=tokenizer.mask_token_id,
            draw=lambda r: int(r.integers(len(tokenizer))),
        )
        end = None if self.longest is None else self.longest - 2
        return [tokenizer.cls_token_id, *changed[:end], tokenizer.sep_token_id]

    def _pieces(self, caption: str) -> list[list[int]]:
        pieces = (self.tokenizer.encode(word, add_special_tokens=False) for word in caption.split())
        return [ids for ids in pieces if ids] or [[self.tokenizer.unk_token_id]]

    def count_too_long(self, captions: Iterable[str]) -> int:
        """How many captions are cut off. Only those are looked at whose letters could be enough for it."""
        if self.longest is None:
            return 0
        limit = self.longest - 2
        # a letter gives at most four pieces, one per byte
        suspects = (caption for caption in captions if 4 * len(caption) > limit)
        return sum(sum(map(len, self._pieces(caption))) > limit for caption in suspects)


def augment_words(
    ids: list[list[int]],
    random: np.random.Generator | None,
    probability: float,
    *,
    mask: int,
    draw: Callable[[np.random.Generator], int],
) -> list[int]:
    """The ids of all words in a row; in training each word is, with ``probability``, changed.

    Of the changed words 50% are masked, 10% replaced by a random one, 40% deleted, as in the release.
    A caption keeps at least one word.
    """
    if random is None:
        return [i for word in ids for i in word]
    kept: list[int] = []
    for word in ids:
        change = random.random() / probability if probability > 0 else 1.0
        if change >= 1:
            kept.extend(word)
        elif change < 0.5:
            kept.extend([mask] * len(word))
        elif change < 0.6:
            kept.extend(draw(random) for _ in word)
    return kept or ids[int(random.integers(len(ids)))]
