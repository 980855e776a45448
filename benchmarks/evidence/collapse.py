"""Does the relational objective collapse? python -m benchmarks.evidence.collapse --data icons synthetic

Every start of the relation modules against the pair loss alone, at the same learning rate, without warm-up: triplet
with four samplings and two reductions, InfoNCE; rates from 1e-4 to 1.6e-2; with and without clipping at 2; three seeds.
A start is safe if the held-out rSum does not fall below 0.95 times that of the pair loss alone. All starts of a seed
have the same encoders at first and the same batches in the same order: the order alone moves rSum by several per
cent, as ``again`` shows, the pair loss alone with other dropout masks. One line per training goes to collapse.csv; what
is there is skipped, seeds are the outermost loop, so a run may be stopped anywhere. ``--summary`` prints what is there.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.evidence import folders, store
from benchmarks.evidence.__main__ import CACHE
from benchmarks.evidence.encoders import DIM, Pair
from benchmarks.evidence.loaded import Loaded, load
from benchmarks.evidence.training import evaluate
from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction, TripletLoss
from hrem_layers._core.numerics import cosine_matrix, l2_normalize
from hrem_layers.relations import RelationGraph

PAIRS = (*(f"{s}-{r}" for s in ("distance_weighted", "hardest", "all", "expected") for r in ("sum", "mean")), "infonce")
STARTS = {
    "base": "the pair loss alone",
    "again": "the same with other dropout masks: what chance does to a ratio",
    "library": "HREMLoss as it comes",
    "bare": "the interaction's output alone, as in the release",
    "residual": "plain embedding + interaction's output, both normalised, without a gate",
    "residual_half": "the same, relational weights 0.5",
    "residual_quarter": "the same, relational weights 0.25",
    "residual_tenth": "the same, relational weights 0.1",
    "gate_tenth": "as the library, but the gate is learned from 0.1",
    "centred": "the batch's mean taken from the enhanced embeddings",
    "zero": "bare, both branches of the layer zero at first",
    "tenth": "bare, a tenth of the learning rate for the relation modules",
}
FOLD = 100  # a gallery in which there is something to lose
KEY = ("data", "start", "pair", "lr", "clip", "seed", "steps", "batch")
COLUMNS = (*KEY, "rsum", "enhanced", "cosine", "norm", "seconds", "commit")
CHECKPOINTS = 4  # over whose rSum is averaged: the last, and those before it at distances of a twentieth of the steps
LRS = (1.6e-2, 4e-3, 1e-3, 8e-3, 1e-4)


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
    gate = 0.1 if start == "gate_tenth" else None
    inner = RelationInteraction(DIM, residual=start.startswith("residual") or gate is not None, gate=gate)
    if start == "zero":
        with torch.no_grad():
            for layer in inner.layers:
                for p in (layer.self_attn.out_proj.weight, layer.linear2.weight, layer.linear2.bias):  # type: ignore[union-attr]
                    p.zero_()  # type: ignore[operator]
    wrap = Centred if start == "centred" else None
    weight = {"residual_half": 0.5, "residual_quarter": 0.25, "residual_tenth": 0.1}.get(start, 1.0)
    return HREMLoss(
        DIM, graph=AssociationGraph(alignment="cosine"), interaction=inner if wrap is None else wrap(inner),
        pair_loss=pair, enhanced_weight=weight, cross_weight=weight,
    )  # fmt: skip


def train_start(
    data: Loaded, start: str, pair: str, *, lr: float, clip: float, seed: int, steps: int, batch: int
) -> dict[str, Any]:
    """Mean rSum of galleries of 100 on dev, averaged over the last checkpoints; of the last step L(v̄, ū) and the mean
    cosine among v̄ (NaN: no v̄); the largest norm of the gradient before clipping, over all steps."""
    torch.manual_seed(seed)
    model, loss = Pair(data, 0.1).train(), pair_loss(pair)
    hrem = None if start in ("base", "again") else hrem_loss(start, loss)
    torch.manual_seed(seed + 1000 * (start == "again"))  # dropout, sampling of negatives
    relation = [] if hrem is None else list(hrem.parameters())
    groups = [{"params": list(model.parameters())}, {"params": relation, "lr": lr / 10 if start == "tenth" else lr}]
    optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=1e-4)
    first = torch.searchsorted(data.train.owner, torch.arange(len(data.train.images)))  # one caption per image
    order, shuffle = torch.empty(0, dtype=torch.long), torch.Generator().manual_seed(seed)
    read = {steps - i * max(1, steps // 20) for i in range(CHECKPOINTS)}
    totals: list[float] = []
    norm = 0.0
    seen: dict[str, Tensor] = {}
    if hrem is not None:
        hrem.interaction.register_forward_hook(lambda *_: seen.__setitem__("enhanced", _[2][0].detach()))
    for step in range(1, steps + 1):
        if len(order) < batch:
            order = torch.randperm(len(first), generator=shuffle)
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
        largest = nn.utils.clip_grad_norm_([*model.parameters(), *relation], clip or torch.inf)
        norm = max(norm, largest.item())
        optimizer.step()
        if step in read:
            totals.append(_held_out(model, data))
            model.train()
    cosine = torch.nan
    if seen:
        x = l2_normalize(seen["enhanced"])
        cosine = (((x @ x.t()).sum() - batch) / (batch * (batch - 1))).item()
    mean = sum(totals) / len(totals)
    return {"rsum": mean, "enhanced": enhanced.item(), "cosine": cosine, "norm": norm}


def _held_out(model: Pair, data: Loaded) -> float:
    v, u = model.embed(data.dev)
    first = torch.searchsorted(data.dev.owner, torch.arange(len(v)))
    folds = zip(v.split(FOLD), u[first].split(FOLD), strict=True)
    totals = [evaluate(x, y, torch.arange(len(x)))["rsum"] for x, y in folds]
    return sum(totals) / len(totals)


def ratios(lines: Sequence[dict[str, str]], data: str, start: str) -> dict[tuple[str, ...], list[float]]:
    """rSum over that of ``base`` in the same training: (pair, lr, clip, steps) -> a ratio per seed."""
    same = ("data", "pair", "lr", "clip", "seed", "steps", "batch")
    base = {tuple(x[k] for k in same): float(x["rsum"]) for x in lines if x["start"] == "base"}
    out: dict[tuple[str, ...], list[float]] = {}
    for x in lines:
        key = tuple(x[k] for k in same)
        if (x["data"], x["start"]) == (data, start) and key in base:
            out.setdefault(tuple(x[k] for k in ("pair", "lr", "clip", "steps")), []).append(
                float(x["rsum"]) / base[key]
            )
    return out


def summary(lines: Sequence[dict[str, str]]) -> list[str]:
    """A table: per data set, steps, start and rate the number of trainings and how their ratios to the pair loss alone
    lie."""
    out = [
        "| data | steps | start | learning rate | conditions | trainings | mean ratio | lowest mean over seeds "
        "| below 0.95: means over seeds | below 0.95: trainings | lowest training |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for data, steps in dict.fromkeys((x["data"], x["steps"]) for x in lines):
        for start in (s for s in STARTS if s != "base"):
            found = {k: v for k, v in ratios(lines, data, start).items() if k[3] == steps}
            for lr in [*sorted({k[1] for k in found}, key=float), *(["all"] if found else [])]:
                part = [v for k, v in found.items() if lr in (k[1], "all")]
                single = [r for v in part for r in v]
                means = [sum(v) / len(v) for v in part]
                cells = [data, steps, f"`{start}`", lr, len(part), len(single), f"{sum(single) / len(single):.3f}",
                         f"{min(means):.3f}", sum(m < 0.95 for m in means), sum(r < 0.95 for r in single),
                         f"{min(single):.3f}"]  # fmt: skip
                out.append(f"| {' | '.join(map(str, cells))} |")
    return out


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence.collapse",
        description=__doc__,
        epilog="Starts: " + "; ".join(f"{name}: {text}" for name, text in STARTS.items()),
    )
    p.add_argument("--data", nargs="+", default=["icons", "synthetic"])
    p.add_argument("--starts", nargs="+", choices=list(STARTS), default=["base", "library"])
    p.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS), metavar="PAIR")
    p.add_argument("--lrs", nargs="+", type=float, default=list(LRS))
    p.add_argument("--clips", nargs="+", type=float, default=[0, 2])
    p.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--cache-dir", type=Path, default=CACHE)
    p.add_argument("--out", type=Path, default=store.HERE / "collapse.csv")
    p.add_argument("--summary", action="store_true", help="train nothing, print the table of what is there")
    a = p.parse_args(argv)
    lines = read(a.out)
    if a.summary:
        print("\n".join(summary(lines)))
        return
    if not lines:
        a.out.write_text(",".join(COLUMNS) + "\n", encoding="utf-8")
    done = {tuple(x[k] for k in KEY): x for x in lines}
    data = {d: load(folders.prepare(d, a.cache_dir.expanduser()), folders.CAPTIONS.get(d, 5)) for d in a.data}
    commit = store.commit()
    for seed, clip, lr, d, pair, start in itertools.product(a.seeds, a.clips, a.lrs, a.data, a.pairs, a.starts):
        key = (Path(d).name, start, pair, f"{lr:g}", f"{clip:g}", str(seed), str(a.steps), str(a.batch))
        if key in done:
            continue
        begin = time.process_time()
        free = done.get((*key[:4], "0", *key[5:]))
        if free is not None and float(free["norm"]) < 0.99 * clip:  # nothing was clipped: the very same training
            new = {**free, **dict(zip(KEY, key, strict=True)), "seconds": "0"}
        else:
            got = train_start(data[d], start, pair, lr=lr, clip=clip, seed=seed, steps=a.steps, batch=a.batch)
            values = [f"{got['rsum']:.2f}", *(f"{got[k]:.3f}" for k in ("enhanced", "cosine", "norm"))]
            new = dict(zip(COLUMNS, [*key, *values, f"{time.process_time() - begin:.1f}", commit], strict=True))
        done[key] = new
        with a.out.open("a", encoding="utf-8") as file:
            file.write(",".join(new[k] for k in COLUMNS) + "\n")


def read(path: Path) -> list[dict[str, str]]:
    """The lines of ``path``, none if there is no such file; one that a killed run left unfinished is cut off.

    Raises:
        ValueError: the columns are others than :data:`COLUMNS`.
    """
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        path.write_text(whole, encoding="utf-8")
    rows = csv.DictReader(whole.splitlines())
    if rows.fieldnames is not None and tuple(rows.fieldnames) != COLUMNS:
        raise ValueError(f"{path}: expected the columns {','.join(COLUMNS)}, found {','.join(rows.fieldnames)}")
    return list(rows)


if __name__ == "__main__":
    main()
