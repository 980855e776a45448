"""Captions as token ids, for a BiGRU with a vocabulary of its own and for BERT."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
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
    """WordPiece ids by a tokenizer of the transformers library, between [CLS] and [SEP]."""

    def __init__(self, tokenizer: Any, *, augment: float) -> None:
        self.tokenizer, self.augment = tokenizer, augment

    def __call__(self, caption: str, random: np.random.Generator | None) -> list[int]:
        tokenizer = self.tokenizer
        pieces = (tokenizer.encode(word, add_special_tokens=False) for word in caption.split())
        changed = augment_words(
            [ids for ids in pieces if ids] or [[tokenizer.unk_token_id]],
            random,
            self.augment,
            mask=tokenizer.mask_token_id,
            draw=lambda r: int(r.integers(len(tokenizer))),
        )
        return [tokenizer.cls_token_id, *changed, tokenizer.sep_token_id]


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


def read_word_vectors(path: Path, wanted: Iterable[str] | None) -> dict[str, np.ndarray]:
    """Vectors of the ``wanted`` words (None: of all) in a GloVe-style text file or .npz of ``words`` and ``vectors``.

    Raises:
        ValueError: the file is missing or is neither form.
    """
    if not path.is_file():
        raise ValueError(f"--word-vectors: expected a file of word vectors, found no file {path}")
    wanted = None if wanted is None else set(wanted)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as archive:
            missing = {"words", "vectors"} - set(archive.files)
            if missing:
                raise ValueError(f"{path}: expected arrays 'words' and 'vectors', found {archive.files}")
            return {
                str(w): v
                for w, v in zip(archive["words"], archive["vectors"].astype(np.float32), strict=True)
                if wanted is None or str(w) in wanted
            }
    vectors: dict[str, np.ndarray] = {}
    size = None
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            word, *values = line.rstrip("\n").split(" ")
            if number == 1 and len(values) == 1:
                continue  # word2vec's header: how many words, how many dimensions
            size = len(values) if size is None else size
            try:
                if len(values) != size:
                    raise ValueError(f"{len(values)} numbers")
                if wanted is None or word in wanted:
                    vectors[word] = np.array(values, dtype=np.float32)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number}: expected a word and {size} numbers, found {line[:60]!r} ({error})"
                ) from error
    return vectors
