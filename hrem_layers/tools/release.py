"""The settings of the authors' release as a whole (Flickr30K), and its objective made of them.

The defaults of the library are what measurements support; they differ from the release's in the alignment, the
residual of the interaction and the warm-up. Who compares with the paper's figures wants all of the release's, together:

    >>> from hrem_layers.tools import release
    >>> loss = release.loss(64)
    >>> loss.graph.alignment, loss.interaction.residual, loss.warmup_steps
    ('scan', False, 8000)
    >>> release.SETTINGS["training"]["lr"]
    0.0005

What cannot be set, as the release's faults are mended here, is in the documentation, "the method".
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from hrem_layers.fragments import FragmentRelation
from hrem_layers.graph import AssociationGraph
from hrem_layers.interaction import RelationInteraction
from hrem_layers.loss import HREMLoss
from hrem_layers.losses import TripletLoss

_SETTINGS: dict[str, dict[str, Any]] = {
    # the arguments of FragmentRelation, AssociationGraph, RelationInteraction, TripletLoss and HREMLoss
    "fragments": {"num_heads": 16, "num_layers": 1, "dropout": 0.1, "beta": 0.8, "max_pool_k": 2},
    "graph": {
        "alignment": "scan", "topk": 10, "neighbor_ratio": 0.5, "sigma": 1.0, "squared_distance": False,
        "detach_fragments": True, "exclude_positives": False,
    },
    "interaction": {
        "mechanism": "fusion", "num_heads": 16, "num_layers": 1, "dropout": 0.1, "relation_weight": 1.0,
        "residual": False,
    },
    "pair_loss": {
        "margin": 0.2, "negative_sampling": "distance_weighted", "cutoff": 0.5, "nonzero_cutoff": 1.7,
        "weight_dim": 512, "reduction": "sum",
    },
    "loss": {
        "enhanced_weight": 1.0, "cross_weight": 1.0, "regularization_weight": 10.0, "warmup_steps": 8000,
    },
    # AdamW, whose rate is divided by ten after the epochs lr_steps; BERT's is lr * bert_lr_factor
    "training": {
        "embed_dim": 1024, "text_encoder": "bert", "epochs": 30, "batch_size": 128, "lr": 5e-4,
        "bert_lr_factor": 0.1, "lr_steps": (15, 25), "lr_decay": 0.1, "weight_decay": 1e-4, "grad_clip": 2.0,
        "region_drop": 0.2, "word_drop": 0.2, "captions_per_image": 5,
    },
}  # fmt: skip
SETTINGS: Mapping[str, Mapping[str, Any]] = MappingProxyType({k: MappingProxyType(v) for k, v in _SETTINGS.items()})
"""By section, read-only; of the sections but the last the keys are the arguments of the module that they name."""

COCO: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "pair_loss": {"nonzero_cutoff": 1.9}, "interaction": {"relation_weight": 1.5}, "training": {"batch_size": 256},
})  # fmt: skip
"""What the release, and the command that it gives, have otherwise on MS-COCO, by section:
``release.pair_loss(**release.COCO["pair_loss"])``."""


def fragment_relation(embed_dim: int = 1024, **changes: Any) -> FragmentRelation:
    """The release's pooling of one modality; ``changes`` are arguments of :class:`hrem_layers.FragmentRelation`."""
    return FragmentRelation(embed_dim, **{**SETTINGS["fragments"], **changes})


def graph(**changes: Any) -> AssociationGraph:
    """The release's graph; ``changes`` are arguments of :class:`hrem_layers.AssociationGraph`."""
    return AssociationGraph(**{**SETTINGS["graph"], **changes})


def interaction(embed_dim: int = 1024, **changes: Any) -> RelationInteraction:
    """The release's interaction; ``changes`` are arguments of :class:`hrem_layers.RelationInteraction`."""
    return RelationInteraction(embed_dim, **{**SETTINGS["interaction"], **changes})


def pair_loss(**changes: Any) -> TripletLoss:
    """The release's triplet loss; ``changes`` are arguments of :class:`hrem_layers.TripletLoss`, as in :data:`COCO`."""
    return TripletLoss(**{**SETTINGS["pair_loss"], **changes})


def loss(embed_dim: int = 1024, **changes: Any) -> HREMLoss:
    """The release's objective with all its parts.

    Args:
        embed_dim: the size D of an embedding.
        changes: arguments of :class:`hrem_layers.HREMLoss`, whole parts among them, as in
            ``loss(64, interaction=interaction(64, num_heads=4), warmup_steps=100)``.

    Raises:
        TypeError, ValueError: as the modules do.
    """
    parts: dict[str, Any] = {**SETTINGS["loss"], **changes}
    if parts.get("graph") is None:
        parts["graph"] = graph()
    if parts.get("interaction") is None:
        parts["interaction"] = interaction(embed_dim)
    if parts.get("pair_loss") is None:
        parts["pair_loss"] = pair_loss()
    return HREMLoss(embed_dim, **parts)
