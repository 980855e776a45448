"""Does the relational objective collapse? python -m benchmarks.evidence.collapse --data icons synthetic

Every start of the relation modules against the pair loss alone, at the same learning rate, without warm-up: triplet
with four samplings and two reductions, InfoNCE; rates from 1e-4 to 1.6e-2; with and without clipping at 2. A start is
safe if the held-out rSum never falls below 0.95 times that of the pair loss alone. One line per training goes to
collapse.csv; what is there is skipped.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import folders, store
from benchmarks.evidence.__main__ import CACHE
from benchmarks.evidence.loaded import Loaded, load
from benchmarks.evidence.training import DIM, Pair, evaluate
from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction, TripletLoss
from hrem_layers._core.numerics import cosine_matrix, l2_normalize
from hrem_layers.relations import RelationGraph

PAIRS = (*(f"{s}-{r}" for s in ("distance_weighted", "hardest", "all", "expected") for r in ("sum", "mean")), "infonce")
STARTS = {
    "base": "the pair loss alone",
    "library": "HREMLoss as it comes",
    "bare": "the interaction's output alone, as in the release",
    "residual": "plain embedding + interaction's output, both normalised",
    "residual_half": "the same, relational weights 0.5",
    "centred": "the batch's mean taken from the enhanced embeddings",
    "zero": "bare, both branches of the layer zero at first",
    "tenth": "bare, a tenth of the learning rate for the relation modules",
}
FOLD = 100  # a gallery in which there is something to lose
KEY = ("data", "start", "pair", "lr", "clip", "seed", "steps", "batch")
COLUMNS = (*KEY, "rsum", "enhanced", "cosine", "seconds", "commit")


class Centred(nn.Module):
    """Equal embeddings become zero: a constant cannot lower the loss."""

    def __init__(self, interaction: RelationInteraction) -> None:
        super().__init__()
        self.interaction, self.embed_dim = interaction, interaction.embed_dim

    def forward(self, image_embedding: Tensor, text_embedding: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        v, u = self.interaction(image_embedding, text_embedding, graph)
        return v - v.mean(dim=0), u - u.mean(dim=0)


def pair_loss(name: str) -> nn.Module:
    if name == "infonce":
        return InfoNCELoss()
    sampling, reduction = name.rsplit("-", 1)
    return TripletLoss(negative_sampling=sampling, reduction=reduction)


def hrem_loss(start: str, pair: nn.Module) -> HREMLoss:
    if start == "library":
        return HREMLoss(DIM, pair_loss=pair)
    inner = RelationInteraction(DIM, residual=start.startswith("residual"))
    if start == "zero":
        with torch.no_grad():
            for layer in inner.layers:
                for p in (layer.self_attn.out_proj.weight, layer.linear2.weight, layer.linear2.bias):  # type: ignore[union-attr]
                    p.zero_()  # type: ignore[operator]
    wrap = Centred if start == "centred" else None
    weight = 0.5 if start == "residual_half" else 1.0
    return HREMLoss(
        DIM, graph=AssociationGraph(alignment="cosine"), interaction=inner if wrap is None else wrap(inner),
        pair_loss=pair, enhanced_weight=weight, cross_weight=weight,
    )  # fmt: skip


def train_start(
    data: Loaded, start: str, pair: str, *, lr: float, clip: float, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """Mean rSum of galleries of 100 on dev; of the last step L(v̄, ū) and the mean cosine among v̄ (NaN: no v̄)."""
    torch.manual_seed(seed)
    model, loss = Pair(data, 0.1).train(), pair_loss(pair)
    hrem = None if start == "base" else hrem_loss(start, loss)
    relation = [] if hrem is None else list(hrem.parameters())
    groups = [{"params": list(model.parameters())}, {"params": relation, "lr": lr / 10 if start == "tenth" else lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
    first = torch.searchsorted(data.train.owner, torch.arange(len(data.train.images)))  # one caption per image
    order = torch.empty(0, dtype=torch.long)
    seen: dict[str, Tensor] = {}
    if hrem is not None:
        hrem.interaction.register_forward_hook(lambda *_: seen.__setitem__("enhanced", _[2][0].detach()))
    for _ in range(steps):
        if len(order) < batch:
            order = torch.randperm(len(first))
        i, order = order[:batch], order[batch:]
        tokens = data.train.tokens[first[i]]
        tokens = tokens[:, : int((tokens > 0).sum(dim=1).max())]
        v, u, regions, words = model(data.train.images[i], tokens)
        if hrem is None:
            total = loss(cosine_matrix(l2_normalize(v), l2_normalize(u)), torch.eye(batch, dtype=torch.bool))
            enhanced = torch.tensor(torch.nan)
        else:
            terms = hrem.terms(v, u, regions, words, None, tokens > 0)
            total, enhanced = terms.total, terms.enhanced
        optimizer.zero_grad()
        total.backward()
        if clip:
            nn.utils.clip_grad_norm_([*model.parameters(), *relation], clip)
        optimizer.step()
    cosine = torch.nan
    if seen:
        x = l2_normalize(seen["enhanced"])
        cosine = (((x @ x.t()).sum() - batch) / (batch * (batch - 1))).item()
    return {"rsum": _held_out(model, data), "enhanced": enhanced.item(), "cosine": cosine}


def _held_out(model: Pair, data: Loaded) -> float:
    v, u = model.embed(data.dev)
    first = torch.searchsorted(data.dev.owner, torch.arange(len(v)))
    folds = zip(v.split(FOLD), u[first].split(FOLD), strict=True)
    totals = [evaluate(x, y, torch.arange(len(x)))["rsum"] for x, y in folds]
    return sum(totals) / len(totals)


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.collapse",
        description=__doc__,
        epilog="Starts: " + "; ".join(f"{name}: {text}" for name, text in STARTS.items()),
    )
    p.add_argument("--data", nargs="+", default=["icons", "synthetic"])
    p.add_argument("--starts", nargs="+", choices=list(STARTS), default=["base", "library"])
    p.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR")
    p.add_argument("--lrs", nargs="+", type=float, default=[1e-4, 1e-3, 4e-3, 8e-3, 1.6e-2])
    p.add_argument("--clips", nargs="+", type=float, default=[0, 2])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--cache-dir", type=Path, default=CACHE)
    p.add_argument("--out", type=Path, default=store.HERE / "collapse.csv")
    a = p.parse_args(argv)
    done = set()
    if a.out.is_file():
        with a.out.open(encoding="utf-8", newline="") as file:
            done = {tuple(row[k] for k in KEY) for row in csv.DictReader(file)}
    else:
        a.out.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    data = {d: load(folders.prepare(d, a.cache_dir.expanduser()), folders.CAPTIONS.get(d, 5)) for d in a.data}
    commit = store.commit()
    for seed, d, clip, lr, pair, start in itertools.product(a.seeds, a.data, a.clips, a.lrs, a.pairs, a.starts):
        key = (Path(d).name, start, pair, f"{lr:g}", f"{clip:g}", str(seed), str(a.steps), str(a.batch))
        if key in done:
            continue
        begin = time.process_time()
        got = train_start(data[d], start, pair, lr=lr, clip=clip, seed=seed, steps=a.steps, batch=a.batch)
        row = [*key, f"{got['rsum']:.2f}", f"{got['enhanced']:.3f}", f"{got['cosine']:.3f}"]
        with a.out.open("a", encoding="utf-8") as file:
            file.write(",".join([*row, f"{time.process_time() - begin:.1f}", commit]) + "\n")


if __name__ == "__main__":
    main()
