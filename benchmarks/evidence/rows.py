"""What is compared: the rows of the table."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.evidence.soft_targets import TEACHERS
from hrem_layers import AssociationGraph, RelationInteraction


@dataclass(frozen=True)
class Row:
    pair: str = "triplet"  # or "infonce"
    batch_factor: int = 1
    neighbors: str = ""  # "", "all", "half" of the epochs
    images_per_cluster: int | None = None  # None: of the settings
    relations: bool = False
    mechanism: str = "fusion"
    alignment: str = "cosine"
    start: str = "residual"  # plain embedding + interaction; "bare": the latter alone; "gated": as the library has it
    exclude_positives: bool = False
    everyone_connected: bool = False  # ablation of A
    relevance: bool = True  # ablation of S
    regularization: bool = True
    cross: bool = True
    soft: str = ""  # a teacher of soft_targets.py, on InfoNCE

    def hrem_options(self, dim: int, settings: dict[str, Any]) -> dict[str, Any]:
        graph: dict[str, Any] = {"alignment": self.alignment}
        if self.exclude_positives:
            if "exclude_positives" not in inspect.signature(AssociationGraph).parameters:
                raise ValueError("row: expected an AssociationGraph with exclude_positives, got one without")
            graph["exclude_positives"] = True
        if self.everyone_connected:
            graph["neighbor_ratio"] = 1.0
        interaction = RelationInteraction(
            dim,
            mechanism=self.mechanism,
            dropout=settings["dropout"],
            relation_weight=float(self.relevance),
            residual=self.start != "bare",
            gate=0.0 if self.start == "gated" else None,
        )
        weight = settings["relation_weight"]
        return {
            "graph": AssociationGraph(**graph),
            "interaction": interaction,
            "enhanced_weight": weight,
            "cross_weight": weight * self.cross,
            "regularization_weight": 10 * weight * self.regularization,
        }


_RELATIONS = Row(relations=True)  # as they were before the gate: the first rows that were read
_GATED = replace(_RELATIONS, start="gated")
_CHANGES: dict[str, dict[str, Any]] = {
    "_standalone": {"mechanism": "standalone"},
    "_scan": {"alignment": "scan"},
    "_exclude": {"exclude_positives": True},
    "_no_A": {"everyone_connected": True},
    "_no_S": {"relevance": False},
    "_no_reg": {"regularization": False},
    "_no_cross": {"cross": False},
}
_TRIPLET = {
    "base": Row(),
    "base_large_batch": Row(batch_factor=4),
    "neighbors_all": Row(neighbors="all"),
    "neighbors_half": Row(neighbors="half"),
    "neighbors_half_k4": Row(neighbors="half", images_per_cluster=4),
    "neighbors_half_k16": Row(neighbors="half", images_per_cluster=16),
    "relations": _RELATIONS,
    "relations_bare": replace(_RELATIONS, start="bare"),
    **{f"relations{ending}": replace(_RELATIONS, **change) for ending, change in _CHANGES.items()},
    "relations_gated": _GATED,
    **{f"gated{ending}": replace(_GATED, **change) for ending, change in _CHANGES.items()},
    "gated_neighbors": replace(_GATED, neighbors="half"),
    "both": replace(_RELATIONS, neighbors="half"),
}
ROWS = {name + ending: replace(row, pair=pair) for pair, ending in (("triplet", ""), ("infonce", "_infonce"))
        for name, row in _TRIPLET.items()}  # fmt: skip
ROWS |= {f"soft_{teacher}_infonce": Row(pair="infonce", soft=teacher) for teacher in TEACHERS}
ROWS["soft_relations_infonce"] = replace(_GATED, pair="infonce", soft="relations", exclude_positives=True)
ROWS["recipe"] = ROWS["relations_gated"]  # what the documentation recommends; with 6 and 12 epochs it was "relations"
