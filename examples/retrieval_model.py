"""The model of the example: two encoders and, for training, the loss with its relation modules."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import processes
import torch
from checkpoint_checks import fault, match, size_of
from data_files import digest
from encoders import BertEncoder, BiGRUEncoder, ImageEncoder, load_bert, longest_caption
from pair_data import Batch, Pairs
from text_tokens import BertTokens, Vocabulary
from torch import Tensor, nn
from word_vectors import read_word_vectors, say_found

from hrem_layers import (
    AssociationGraph,
    FragmentRelation,
    HREMLoss,
    HREMTerms,
    InfoNCELoss,
    RelationInteraction,
    TripletLoss,
)


class RetrievalModel(nn.Module):
    """Both encoders and, for training, the loss with its relation modules."""

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, loss: nn.Module) -> None:
        super().__init__()
        self.image_encoder, self.text_encoder, self.loss = image_encoder, text_encoder, loss

    def forward(self, batch: Batch) -> HREMTerms:
        image_embedding, regions = self.image_encoder(batch.images, batch.image_mask)
        text_embedding, words = self.text_encoder(batch.tokens, batch.text_mask)
        return self.loss.terms(
            image_embedding, text_embedding, regions, words, batch.image_mask, batch.text_mask, batch.image_ids
        )


class PlainLoss(nn.Module):
    """``--mechanism none``: the pair loss alone, for comparison."""

    def __init__(self, pair_loss: nn.Module) -> None:
        super().__init__()
        self.pair_loss = pair_loss

    def terms(self, image_embedding: Tensor, text_embedding: Tensor, *fragments_masks_ids: Tensor) -> HREMTerms:
        v, u = (
            processes.gather_rows(nn.functional.normalize(x.float(), dim=1)) for x in (image_embedding, text_embedding)
        )
        ids = processes.gather_rows(fragments_masks_ids[-1])
        loss = self.pair_loss(v @ u.t(), ids.unsqueeze(1) == ids)
        zero = loss.new_zeros(())
        return HREMTerms(loss, loss, zero, zero, zero, zero)


class Words(NamedTuple):
    """What the BiGRU knows: its words in the order of their ids, and pretrained vectors of some of them."""

    known: list[str]
    vectors: dict[str, Any] | None = None
    size: int = 300  # of a vector


class Built(NamedTuple):
    model: RetrievalModel
    encode: Vocabulary | BertTokens
    vocabulary: list[str]  # empty for BERT


def known_words(arguments: argparse.Namespace, pairs: Pairs, vectors: Path | None) -> Words:
    """The words of the training captions, and with ``--open-vocabulary`` all that have a vector."""
    if arguments.text_encoder == "bert":
        return Words([])
    frequent = Vocabulary.of(pairs.captions, min_count=arguments.vocabulary_min_count, augment=0.0).known
    if not frequent:
        raise ValueError(
            f"--vocabulary-min-count {arguments.vocabulary_min_count}: no word of the training captions occurs so often"
        )
    if vectors is None:
        return Words(frequent)
    found = read_word_vectors(vectors, None if arguments.open_vocabulary else frequent)
    say_found(vectors, found, frequent)
    more = sorted(found.keys() - set(frequent)) if arguments.open_vocabulary else []
    return Words(frequent + more, found, len(next(iter(found.values()))))


def build(arguments: argparse.Namespace, feature_dim: int, words: Words) -> Built:
    """The model, and the function that turns captions into tokens."""

    def relation() -> FragmentRelation:
        return FragmentRelation(arguments.embed_dim, num_heads=arguments.num_heads, dropout=arguments.dropout)

    if arguments.text_encoder == "bert":
        tokenizer, bert = load_bert(arguments.bert)
        encode: Vocabulary | BertTokens = BertTokens(
            tokenizer, augment=arguments.word_drop, longest=longest_caption(tokenizer, bert)
        )
        text_encoder: nn.Module = BertEncoder(bert, arguments.embed_dim, relation())
    else:
        encode = Vocabulary(words.known, augment=arguments.word_drop)
        text_encoder = BiGRUEncoder(encode, arguments.embed_dim, relation(), word_dim=words.size, vectors=words.vectors)
    if arguments.pair_loss == "triplet":
        pair_loss: nn.Module = TripletLoss(
            negative_sampling=arguments.negatives, nonzero_cutoff=arguments.nonzero_cutoff
        )
    else:
        pair_loss = InfoNCELoss()
    if arguments.mechanism == "none":
        loss: nn.Module = PlainLoss(pair_loss)
    else:
        loss = HREMLoss(
            arguments.embed_dim,
            graph=AssociationGraph(candidates=arguments.candidates, alignment=arguments.alignment),
            interaction=RelationInteraction(
                arguments.embed_dim,
                mechanism=arguments.mechanism,
                num_heads=arguments.num_heads,
                dropout=arguments.dropout,
                residual=arguments.residual,
            ),
            pair_loss=pair_loss,
            warmup_steps=arguments.warmup_steps,
            gather_distributed=True,
        )
    image_encoder = ImageEncoder(feature_dim, arguments.embed_dim, relation())
    return Built(RetrievalModel(image_encoder, text_encoder, loss), encode, words.known)


def rebuild(path: Path, state: dict[str, Any], arguments: argparse.Namespace, pairs: Pairs) -> Built:
    """The model of the checkpoint ``path``, whose sizes come from its weights, to be used on ``pairs``.

    Raises:
        ValueError: the weights do not fit the options, or the features; the message names file and key.
    """
    weights = state["model"]
    embed_dim, width = size_of(path, weights, "image_encoder.linear.weight")
    if embed_dim != arguments.embed_dim:
        raise fault(path, "arguments.embed_dim", f"{embed_dim}, the size of the weights", f"{arguments.embed_dim}")
    if width != pairs.features.shape[2]:
        found = pairs.features.shape[2]
        raise ValueError(f"{pairs.path}: expected {width} features per region as {path} takes, found {found}")
    words = Words([])
    if arguments.text_encoder == "bigru":
        words = Words(state["vocabulary"], size=size_of(path, weights, "text_encoder.words.weight")[1])
    built = build(arguments, width, words)
    match(path, "model", weights, built.model.state_dict())
    built.model.load_state_dict(weights)
    return built


def make_optimizer(model: RetrievalModel, arguments: argparse.Namespace) -> torch.optim.Optimizer:
    """AdamW; what is pretrained learns more slowly."""
    if arguments.text_encoder == "bert":
        name, pretrained, factor = "lr_bert", list(model.text_encoder.bert.parameters()), 0.1
    else:
        name, pretrained, factor = "lr_words", list(model.text_encoder.words.parameters()), arguments.word_lr_factor
    slow = {id(p) for p in pretrained}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in slow], "lr": arguments.lr, "name": "lr"},
        {"params": pretrained, "lr": arguments.lr * factor, "name": name},
    ]
    return torch.optim.AdamW(groups, weight_decay=arguments.weight_decay)


def say_what_is_cut(encode: Vocabulary | BertTokens, split: str, pairs: Pairs) -> None:
    """Of a BERT, how many captions of the split are longer than its positions."""
    if not isinstance(encode, BertTokens):
        return
    if count := encode.count_too_long(pairs.captions):
        processes.say(
            f"{split}: {count} of {len(pairs.captions)} captions are longer than the {encode.longest} positions of "
            "--bert and are cut off there"
        )


def vocabulary_fingerprint(words: Words) -> dict[str, str]:
    if not words.known:
        return {}
    return {"the vocabulary": f"{len(words.known)} words with vectors of {words.size}, {digest(words.known)}"}
