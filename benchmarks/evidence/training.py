"""One training: two small encoders, any row's loss and batches; and what it retrieves."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.evidence.encoders import DIM, Pair, make_pair
from benchmarks.evidence.loaded import Loaded, Split
from benchmarks.evidence.rows import Row
from benchmarks.evidence.soft_targets import SoftTargetLoss
from hrem_layers import HREMLoss, InfoNCELoss, NeighborBatchSampler, TripletLoss, retrieval_metrics
from hrem_layers._core.numerics import cosine_matrix, l2_normalize


class Trained(NamedTuple):
    model: Pair
    seconds: float


def train(
    data: Loaded, row: Row, settings: dict[str, Any], *, seed: int, epochs: int, encoders: str = "heads"
) -> Trained:
    """``epochs`` passes over the images, one caption each; the learning rate falls linearly to 0."""
    start = time.process_time()
    torch.manual_seed(seed)
    model = make_pair(encoders, data, settings["dropout"]).train()
    loss = make_loss(row, settings)
    parameters = [*model.parameters(), *loss.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=settings["lr"], weight_decay=1e-4)
    batches = list(make_batches(data.train, row, settings, seed=seed, epochs=epochs))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    pictures = model.pictures(data.train)
    for i in batches:
        owner = data.train.owner[i]
        tokens = data.train.tokens[i]
        tokens = tokens[:, : int((tokens > 0).sum(dim=1).max())]
        real = model.real(data.train, owner)
        v, u, regions, words = model(pictures[owner], tokens, real)
        if isinstance(loss, SoftTargetLoss):
            total = loss(v, u, regions, words, real, tokens > 0, owner, data.vectors[tokens])
        elif isinstance(loss, HREMLoss):
            total = loss(v, u, regions, words, real, tokens > 0, owner)
        else:
            total = loss(cosine_matrix(l2_normalize(v), l2_normalize(u)), owner.unsqueeze(1) == owner)
        optimizer.zero_grad()
        total.backward()
        if settings["clip"]:
            nn.utils.clip_grad_norm_(parameters, settings["clip"])
        optimizer.step()
        schedule.step()
    return Trained(model, time.process_time() - start)


def make_loss(row: Row, settings: dict[str, Any]) -> nn.Module:
    pair: nn.Module
    if row.pair == "infonce":
        pair = InfoNCELoss(settings["temperature"])
    else:
        pair = TripletLoss(settings["margin"], reduction="mean")
    hrem = HREMLoss(DIM, pair_loss=pair, **row.hrem_options(DIM, settings)) if row.relations else None
    if row.soft:
        return SoftTargetLoss(row.soft, settings["temperature"], hrem)
    return pair if hrem is None else hrem


def make_batches(split: Split, row: Row, settings: dict[str, Any], *, seed: int, epochs: int) -> Iterator[Tensor]:
    """Indices of captions. Neighbour batches start after the first half where the row says "half"."""
    n, size = len(split.images), settings["batch"] * row.batch_factor
    per_image = len(split.tokens) // n
    sampler = None
    if row.neighbors:
        k = row.images_per_cluster or settings["images_per_cluster"]
        means = split.means().numpy()
        sampler = NeighborBatchSampler(
            means, clusters_per_batch=size // k, images_per_cluster=k, captions_per_image=per_image, seed=seed
        )
    g = torch.Generator().manual_seed(seed)
    steps = max(1, n // size)
    for epoch in range(epochs):
        if sampler is not None and (row.neighbors == "all" or epoch >= epochs // 2):
            sampler.set_epoch(epoch)
            for _, batch in zip(range(steps), sampler, strict=False):
                yield torch.tensor(batch)
        else:
            order = torch.randperm(n, generator=g)
            captions = order * per_image + torch.randint(per_image, (n,), generator=g)
            yield from (captions[i * size : (i + 1) * size] for i in range(steps))


def evaluate(v: Tensor, u: Tensor, owner: Tensor) -> dict[str, float]:
    """The columns of a result line, recalls in percent."""
    m = retrieval_metrics(v, u, image_ids=torch.arange(len(v)), text_ids=owner)
    out = {f"{way}_{k}": getattr(getattr(m, way), k) for way in ("i2t", "t2i") for k in ("r1", "r5", "r10")}
    return {"rsum": float(np.sum(list(out.values()))), **out}
