"""Both encoders of a trained model without the loss: saved, loaded, and run on features and on words."""

from __future__ import annotations

import beside  # isort: skip  # noqa: F401

import argparse
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import authors_checkpoint
import checkpoint
import checkpoint_checks
import numpy as np
import torch
from pair_data import pad
from retrieval_model import Words, build
from text_tokens import UNKNOWN, Vocabulary, words
from torch import Tensor, nn

BATCH = 64


class Encoders:
    """Images and words to points of the joint space, on the CPU.

    Args:
        state: ``arguments``, ``vocabulary`` and ``model`` as in a checkpoint of the script; of the model's weights
            those of the encoders count.
        path: where it was read, for messages.
        bert: folder or hub name of the BERT, if the checkpoint's own is not here.
    """

    def __init__(self, state: dict[str, Any], path: Path, bert: str | None = None) -> None:
        self.arguments = {key: state["arguments"][key] for key in authors_checkpoint.KEPT}
        if bert is not None:
            self.arguments["bert"] = bert
        self.vocabulary: list[str] = state["vocabulary"]
        self.weights = {k: x for k, x in state["model"].items() if k.startswith(authors_checkpoint.ENCODERS)}
        size_of = checkpoint_checks.size_of
        _, self.feature_dim = size_of(path, self.weights, "image_encoder.linear.weight")
        known = Words([])
        if self.arguments["text_encoder"] == "bigru":
            known = Words(self.vocabulary, size=size_of(path, self.weights, "text_encoder.words.weight")[1])
        unused = {"dropout": 0.0, "word_drop": 0.0, "mechanism": "none", "pair_loss": "infonce"}
        built = build(argparse.Namespace(**self.arguments, **unused), self.feature_dim, known)
        model, self.encode = built.model.eval(), built.encode
        checkpoint_checks.match(path, "model", self.weights, _encoders_only(model.state_dict()))
        model.load_state_dict(self.weights, strict=False)
        self.image_encoder, self.text_encoder = model.image_encoder, model.text_encoder

    def images(self, features: Iterable[np.ndarray]) -> Tensor:
        """``features``: (R, F) per image, R may differ -> (n, D) float32, L2-normalised.

        Raises:
            ValueError: an image has another number of features than the encoder takes, or NaN or inf.
        """
        return self._run(self.image_encoder, map(self._checked, features))

    def texts(self, texts: Sequence[str]) -> Tensor:
        """(n, D) float32, L2-normalised."""
        return self._run(self.text_encoder, (torch.tensor(self.encode(text, None)) for text in texts))

    def unknown(self, text: str) -> list[str]:
        """The words of ``text`` that the text encoder cannot tell from one another, in their order, each once."""
        if isinstance(self.encode, Vocabulary):
            return [word for word in dict.fromkeys(words(text)) if self.encode(word, None) == [UNKNOWN]]
        unknown = self.encode.tokenizer.unk_token_id
        return [word for word in dict.fromkeys(text.split()) if unknown in self.encode(word, None)]

    def knows(self, text: str) -> bool:
        """Whether the text encoder can tell ``text`` from any other of unknown words."""
        if isinstance(self.encode, Vocabulary):
            return any(i != UNKNOWN for i in self.encode(text, None))
        return any(i != self.encode.tokenizer.unk_token_id for i in self.encode(text, None)[1:-1])

    def _checked(self, features: np.ndarray) -> Tensor:
        if features.dtype.kind not in "fiu":
            raise ValueError(f"expected features that are numbers, got {features.dtype} {features.shape}")
        if features.ndim != 2 or features.shape[1] != self.feature_dim or not len(features):
            raise ValueError(
                f"these encoders take (regions, {self.feature_dim}) features per image, got {features.shape}: "
                "encode what they were trained on (pictures: with encoders of examples/search/train.py)"
            )
        return torch.from_numpy(np.asarray(features, dtype=np.float32))

    @torch.inference_mode()
    def _run(self, encoder: nn.Module, rows: Iterable[Tensor]) -> Tensor:
        done = [torch.zeros(0, self.arguments["embed_dim"])]
        done += [nn.functional.normalize(encoder(*pad(batch))[0].float(), dim=1) for batch in _batches(iter(rows))]
        embeddings = torch.cat(done)
        if not embeddings.isfinite().all():
            bad = int((~embeddings.isfinite().all(dim=1)).to(torch.uint8).argmax())
            raise ValueError(f"item {bad}: expected finite features, got NaN or inf")
        return embeddings


def _batches(rows: Iterator[Tensor]) -> Iterator[list[Tensor]]:
    while batch := list(islice(rows, BATCH)):
        yield batch


def _encoders_only(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: x for key, x in weights.items() if key.startswith(authors_checkpoint.ENCODERS)}


def save_encoders(path: Path, encoders: Encoders) -> None:
    """Writes what :func:`load_encoders` reads: weights, vocabulary, sizes; no loss, no optimizer."""
    state = {"arguments": encoders.arguments, "vocabulary": encoders.vocabulary, "model": encoders.weights}
    checkpoint.save(path, {"encoders": 1, **state})


def load_encoders(path: Path, bert: str | None = None) -> Encoders:
    """From a file of :func:`save_encoders`, a checkpoint of the script, or one of the authors' release.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is damaged or another kind of file.
    """
    state = authors_checkpoint.load_any(path, path)
    checkpoint_checks.check(path, state, to_go_on=False)
    return Encoders(state, path, bert)
