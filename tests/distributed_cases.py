"""What test_distributed.py runs in several processes; one start of them serves all cases.

    python tests/distributed_cases.py WORLD_SIZE RESULTS.json [case ...]    # default: all but the slow ones

Every process runs every case; RESULTS.json maps case -> null, or what went wrong where. A case that fails on
one process alone leaves the others waiting: the group's timeout ends that.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import hrem_layers.cross_modal
import hrem_layers.distributed
import hrem_layers.distributed.shares
import hrem_layers.loss
import hrem_layers.relations.lists
from hrem_layers import (
    ALONE,
    AssociationGraph,
    Exchange,
    HREMLoss,
    InfoNCELoss,
    RelationInteraction,
    SigmoidLoss,
    TransformerLayer,
    TripletLoss,
)
from hrem_layers._core.exchange import Rows
from hrem_layers._core.masked import masked_mean
from hrem_layers._core.neighbors import neighbor_products, neighbor_sums, with_all
from hrem_layers.distributed import Shares
from hrem_layers.tools.gradient_cache import gradient_cached_backward

EMBED, RAW = 8, 5
SIDES, ALL = ("image", "text"), slice(None)
CASES: dict[str, Callable[[int, int], None]] = {}
SLOW = ("equal_under_compile",)
TIMEOUT = timedelta(seconds=60)


def case(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    CASES[function.__name__] = function
    return function


class Model(nn.Module):
    """Two encoders and the loss, as a training script would wrap them."""

    def __init__(
        self,
        *,
        gather: bool,
        mechanism: str = "fusion",
        pair_loss: str | Callable[[Tensor, Tensor], Tensor] = "hardest",
        dropout: float = 0.0,
        warmup_steps: int = 0,
        graph: type[AssociationGraph] = AssociationGraph,
        interaction: type[RelationInteraction] = RelationInteraction,
        layer: Callable[[], nn.Module] | None = None,
        **graph_options: object,
    ) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.images, self.texts = nn.Linear(RAW, EMBED), nn.Linear(RAW, EMBED)
        if isinstance(pair_loss, str):
            pair_loss = (
                InfoNCELoss(learnable=True) if pair_loss == "infonce" else TripletLoss(negative_sampling=pair_loss)
            )
        self.loss = HREMLoss(
            EMBED,
            graph=graph(topk=3, **graph_options),
            interaction=interaction(EMBED, mechanism=mechanism, num_heads=2, dropout=dropout, layer=layer, gate=0.6),
            pair_loss=pair_loss,
            warmup_steps=warmup_steps,
            gather_distributed=gather,
        )
        self.double()

    def forward(self, images: Tensor, texts: Tensor, *rest: Tensor | None, **options: Tensor) -> Tensor:
        return self.loss(*self.embed(images, texts, *rest), **options)

    def embed(
        self, images: Tensor, texts: Tensor, image_mask: Tensor | None, text_mask: Tensor | None, ids: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        r, c = self.images(images), self.texts(texts)
        return masked_mean(r, image_mask), masked_mean(c, text_mask), r, c, image_mask, text_mask, ids


class WholeGraph(AssociationGraph):
    """A graph module of the user's own that shares no work: it asks for the fragments of all processes."""

    def forward(self, v, u, r, c, r_mask=None, c_mask=None, *, exchange=ALONE, **options):
        # all of them do the same with what is gathered, so each row's gradient is complete on every process
        r, r_mask = exchange.gather_fragments("image", r, r_mask)
        c, c_mask = exchange.gather_fragments("text", c, c_mask)
        assert v.shape[0] == r.shape[0] == c.shape[0]
        return super().forward(v, u, r, c, r_mask, c_mask, **options)


def ragged(world: int, *, widest_images: int = 4) -> list[tuple[Tensor | None, ...]]:
    """A part for each rank: sizes and widths differ, some ranks have no mask, ids repeat across ranks."""
    generator = torch.Generator().manual_seed(5)

    def side(n: int, width: int, masked: bool) -> tuple[Tensor, Tensor | None]:
        x = torch.randn(n, width, RAW, generator=generator, dtype=torch.double)
        if not masked:
            return x, None
        mask = torch.rand(n, width, generator=generator) > 0.3
        mask[:, 0] = True
        return x, mask

    parts = []
    for rank in range(world):
        n = 4 - rank
        images, image_mask = side(n, widest_images - rank, masked=rank != 0)
        texts, text_mask = side(n, 3 + rank, masked=rank != 1)
        parts.append((images, texts, image_mask, text_mask, torch.arange(n) % 3))
    return parts


def even(world: int, n: int = 3) -> list[tuple[Tensor | None, ...]]:
    """Equal sizes, no masks, no ids."""
    generator = torch.Generator().manual_seed(6)
    return [
        (*(torch.randn(n, 4, RAW, generator=generator, dtype=torch.double) for _ in range(2)), None, None, None)
        for _ in range(world)
    ]


def whole(parts: list[tuple[Tensor | None, ...]]) -> tuple[Tensor | None, ...]:
    """The concatenated batch of one process."""

    def join(place: int) -> tuple[Tensor, Tensor]:
        width = max(part[place].shape[1] for part in parts)
        rows, masks = [], []
        for part in parts:
            x, mask = part[place], part[place + 2]
            mask = torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
            rows.append(nn.functional.pad(x, (0, 0, 0, width - x.shape[1])))
            masks.append(nn.functional.pad(mask, (0, width - x.shape[1])))
        return torch.cat(rows), torch.cat(masks)

    (images, image_mask), (texts, text_mask) = join(0), join(1)
    ids = None if parts[0][4] is None else torch.cat([part[4] for part in parts])
    return images, texts, image_mask, text_mask, ids


def check_equal(
    rank: int, parts: list[tuple[Tensor | None, ...]], *, indices: list[Tensor] | None = None, **options: object
) -> None:
    """Loss, and gradients after DDP's averaging, against one process on the concatenated batch."""
    own, joined = {}, {}
    if indices is not None:  # of the images of each process
        firsts = [sum(len(part[0]) for part in parts[:place]) for place in range(len(parts))]
        own = {"image_index": indices[rank]}
        joined = {"image_index": torch.cat([x + first for x, first in zip(indices, firsts, strict=True)])}
    expected = Model(gather=False, **options)
    torch.manual_seed(3)
    expected_loss = expected(*whole(parts), **joined)
    expected_loss.backward()
    model = Model(gather=True, **options)
    wrapped = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(3 + 100 * rank)  # rank 0's numbers are to be those of one process
    loss = wrapped(*parts[rank], **own)
    loss.backward()
    compare(model, expected, loss, expected_loss)


def compare(model: nn.Module, expected: nn.Module, loss: Tensor, expected_loss: Tensor) -> None:
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    assert loss > 0
    reached = set()
    for (name, got), want in zip(model.named_parameters(), expected.parameters(), strict=True):
        grad = got.grad.full_tensor() if hasattr(got.grad, "full_tensor") else got.grad
        torch.testing.assert_close(grad, want.grad, rtol=1e-8, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")
        if grad.any():
            reached.add(name.rsplit(".", 1)[0])
    assert {"images", "texts", "loss.graph.mlp_i2t.0", "loss.graph.mlp_t2i.0"} < reached, reached


for _mechanism in ("fusion", "standalone"):
    for _pair in ("hardest", "distance_weighted", "infonce"):
        for _detach in (True, False):

            def _equal(rank: int, world: int, m: str = _mechanism, p: str = _pair, d: bool = _detach) -> None:
                check_equal(rank, ragged(world), mechanism=m, pair_loss=p, detach_fragments=d)

            _equal.__name__ = f"equal_{_mechanism}_{_pair}_{'detached' if _detach else 'through_fragments'}"
            case(_equal)


@case
def equal_without_masks_or_ids(rank: int, world: int) -> None:
    check_equal(rank, even(world), detach_fragments=False)


@case
def equal_where_texts_travel(rank: int, world: int) -> None:
    check_equal(rank, ragged(world, widest_images=9), detach_fragments=False)


@case
def equal_with_an_empty_rank(rank: int, world: int) -> None:
    parts = ragged(world)
    parts[-1] = tuple(None if x is None else x[:0] for x in parts[-1])
    check_equal(rank, parts, detach_fragments=False)


@case
def equal_with_dropout_in_the_relation_modules(rank: int, world: int) -> None:
    check_equal(rank, ragged(world), dropout=0.3, pair_loss="distance_weighted")


@case
def equal_with_a_graph_of_the_users_own(rank: int, world: int) -> None:
    check_equal(rank, ragged(world), graph=WholeGraph, detach_fragments=False)


@case
def equal_with_candidates(rank: int, world: int) -> None:
    for detach in (True, False):
        check_equal(rank, ragged(world), candidates=2, detach_fragments=detach)
    check_equal(rank, ragged(world), candidates=100, detach_fragments=False)


for _mechanism in ("fusion", "standalone"):
    for _pair in ("hardest", "distance_weighted", "infonce"):

        def _lists(rank: int, world: int, m: str = _mechanism, p: str = _pair) -> None:
            check_equal(
                rank, ragged(world), mechanism=m, pair_loss=p, candidates=2, detach_fragments=p != "infonce",
                dropout=0.3 if p == "distance_weighted" else 0.0, exclude_positives=p == "hardest",
            )  # fmt: skip

        _lists.__name__ = f"equal_on_lists_{_mechanism}_{_pair}"
        case(_lists)


@case
def equal_on_lists_with_an_empty_rank(rank: int, world: int) -> None:
    parts = ragged(world)
    parts[-1] = tuple(None if x is None else x[:0] for x in parts[-1])
    check_equal(rank, parts, detach_fragments=False, candidates=2)
    check_equal(rank, parts, candidates=2, mechanism="standalone", warmup_steps=0)


@case
def equal_with_several_texts_per_image(rank: int, world: int) -> None:
    """Of unequal shares: images with several texts, in any order, and with none; in the end a process without texts."""
    parts = ragged(world)
    indices = [torch.tensor(x) for x in ([2, 0, 0, 2, 3], [2, 0], [1, 1, 1])][:world]
    for place, index in enumerate(indices):
        images, texts, image_mask, text_mask, ids = parts[place]
        texts = texts[index] * (1 + torch.arange(len(index)).view(-1, 1, 1))
        parts[place] = images, texts, image_mask, None if text_mask is None else text_mask[index], ids
    check_equal(rank, parts, indices=indices, detach_fragments=False, exclude_positives=True)
    check_equal(rank, parts, indices=indices, mechanism="standalone", candidates=2, pair_loss="infonce")
    parts[1] = tuple(x if place in (0, 2, 4) else None if x is None else x[:0] for place, x in enumerate(parts[1]))
    indices[1] = indices[1][:0]
    check_equal(rank, parts, indices=indices, pair_loss="distance_weighted")
    check_equal(rank, parts, indices=indices, candidates=2, detach_fragments=False)


@case
def every_parameter_gets_a_gradient_in_every_phase(rank: int, world: int) -> None:
    """DDP waits for all: also for those of the terms that warm-up and weights of 0 leave out."""
    parts = even(world)
    learnable = {f"{name}_pair_loss": InfoNCELoss(learnable=True) for name in ("enhanced", "cross")}
    for options in (
        {"warmup_steps": 1, **learnable},
        {"enhanced_weight": 0, "cross_weight": 0, **learnable},
        {"enhanced_weight": 0, "cross_weight": 0, "regularization_weight": 0, **learnable},
        {"cross_weight": 0, "regularization_weight": 0, **learnable},
    ):
        for gather in (False, True):
            model = Model(gather=gather)
            interaction = RelationInteraction(EMBED, num_heads=2, gate=0.6)
            model.loss = HREMLoss(EMBED, interaction=interaction, gather_distributed=gather, **options).double()
            wrapped = nn.parallel.DistributedDataParallel(model)
            for _ in range(3):  # an error comes with the next step
                wrapped.zero_grad()
                wrapped(*parts[rank]).backward()
                assert all(p.grad is not None for p in model.parameters()), options


@case
def equal_on_lists_where_the_pair_loss_needs_the_whole_similarity(rank: int, world: int) -> None:
    def hinge(similarity: Tensor, positives: Tensor) -> Tensor:
        return (0.2 + similarity - similarity.diagonal().unsqueeze(1)).masked_fill(positives, 0).clamp(min=0).sum()

    check_equal(rank, ragged(world), candidates=2, pair_loss=hinge)


class OwnInteraction(RelationInteraction):
    """Looks at the graph as in one process."""

    def forward(self, v, u, graph):
        assert graph.index.shape[0] == graph.connection.shape[0] == len(v) + len(u)
        return super().forward(v, u, graph)


class OwnGraph(AssociationGraph):
    def regularization(self, graph, v, u, *, cosines=None):
        assert graph.relevance.shape[0] == len(v) + len(u)
        return super().regularization(graph, v, u, cosines=cosines)


class OwnLayer(TransformerLayer):
    def forward(self, x, bias=None, context=None):
        assert bias.shape[0] == len(x)
        return super().forward(x, bias, context)


@case
def equal_on_lists_with_modules_of_the_users_own(rank: int, world: int) -> None:
    parts = ragged(world)
    for options in (
        {"interaction": OwnInteraction}, {"graph": OwnGraph},
        {"layer": lambda: OwnLayer(EMBED, num_heads=2)},
        {"layer": lambda: OwnLayer(EMBED, num_heads=2), "mechanism": "standalone"},
    ):  # fmt: skip
        check_equal(rank, parts, candidates=2, **options)


@case
def equal_relations_on_lists(rank: int, world: int) -> None:
    parts = ragged(world)
    for mechanism in ("fusion", "standalone"):
        options = {"candidates": 2, "mechanism": mechanism}
        expected, model = Model(gather=False, **options).eval(), Model(gather=True, **options).eval()
        with torch.no_grad():
            got = model.loss.relate(*model.embed(*parts[rank]))
            want = expected.loss.relate(*expected.embed(*whole(parts)))
            terms = model.loss.terms(*model.embed(*parts[rank]))
            for x, y in zip(terms, expected.loss.terms(*expected.embed(*whole(parts))), strict=True):
                torch.testing.assert_close(x, y)
        for x, y in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(x, y)
        assert got.graph.exchange is None
        for x, y in zip(got.graph[:3], want.graph[:3], strict=True):
            torch.testing.assert_close(x, y)


@case
def lists_are_those_of_the_own_rows(rank: int, world: int) -> None:
    """Nothing but what is sent is as long as the batch of all: neighbours, attention, anchors."""
    parts = ragged(world)
    own, everyone = parts[rank][0].shape[0], sum(part[0].shape[0] for part in parts)
    model = Model(gather=True, candidates=2)
    layer = model.loss.interaction.layers[0]
    with (
        recorded(hrem_layers.relations.lists, "nearest_rows") as found,
        recorded(layer.linear1, "forward") as fed,
        recorded(hrem_layers.loss.TripletLoss, "from_embeddings") as streamed,
        recorded(hrem_layers.cross_modal, "align_candidates") as aligned,
    ):
        model(*parts[rank])
    assert [(len(x), len(y)) for x, y, *_ in found] == [(own, everyone)] * 4
    assert [len(x) for x, *_ in fed] == [2 * own]
    assert len(streamed) == 4
    for _, giving, _, _, index in (call[:5] for call in aligned):  # fragments travel to where they are candidates
        assert len(giving) == len(index.unique())


def two_sides(rank: int, world: int) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor], Shares]:
    """Rows of both sides of all and this process's, of unequal numbers, and who belongs together."""
    sizes = tuple(4 - rank for rank in range(world)), tuple(2 + rank for rank in range(world))
    generator = torch.Generator().manual_seed(8)
    everyone = [torch.randn(sum(n), 6, generator=generator, dtype=torch.double).requires_grad_() for n in sizes]
    shares = Shares(*sizes, rank, 1, 1, False, False)
    own = [x.detach()[shares.own(side, 0)].requires_grad_() for side, x in zip(SIDES, everyone, strict=True)]
    pairs = {f"{side}_ids": torch.arange(sum(n)) % 3 for side, n in zip(SIDES, sizes, strict=True)}
    return everyone, own, pairs, shares


def streamed(loss: nn.Module, own: list[Tensor], pairs: dict[str, Tensor], exchange: Exchange) -> Tensor:
    """The loss of the rows of all, from this process's."""
    gathered = [exchange.gather_rows(side, x) for side, x in zip(SIDES, own, strict=True)]
    for mine, x in zip(own, gathered, strict=True):
        exchange = exchange.remember(mine, x)
    rows = {f"{side}_rows": exchange.own(side, len(x)) for side, x in zip(SIDES, gathered, strict=True)}
    value = loss.from_embeddings(*gathered, normalize=False, chunk_size=2, exchange=exchange, **pairs, **rows)
    return exchange.add_up(value)


@case
def of_a_streamed_loss_the_own_rows_stay_for_backward(rank: int, world: int) -> None:
    _, own, pairs, shares = two_sides(rank, world)
    gathered, kept = [], []

    class Watching(Shares):
        def gather_rows(self, side: str, x: Tensor) -> Tensor:
            out = super().gather_rows(side, x)
            gathered.append(weakref.ref(out))
            return out

    for kind in (TripletLoss, InfoNCELoss, SigmoidLoss):
        loss = kind().double()
        gathered.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
            value = streamed(loss, own, pairs, Watching(*shares))
        most = max(map(len, own))
        assert kept and all(not shape or shape[0] <= most for shape in kept), kept
        assert len(gathered) == 2 and all(x() is None for x in gathered), "held by what backward keeps"
        value.backward()


@case
def second_derivatives_of_a_streamed_loss(rank: int, world: int) -> None:
    """W times the gradient of one process comes out, for DDP's average; its derivative again is that of the sum."""
    for loss in (InfoNCELoss(0.3), SigmoidLoss(0.3, bias=-1.0).double(), TripletLoss(negative_sampling="expected")):
        everyone, own, pairs, shares = two_sides(rank, world)
        ours = streamed(loss, own, pairs, shares)
        value = loss.from_embeddings(*everyone, normalize=False, **pairs)
        torch.testing.assert_close(ours, value)
        got = torch.autograd.grad(ours, own, create_graph=True)
        want = torch.autograd.grad(value, everyone, create_graph=True)
        again = torch.autograd.grad(sum((g / world).square().sum() for g in got), own)
        expected = torch.autograd.grad(sum(g.square().sum() for g in want), everyone)
        for side, g, w, h, e in zip(SIDES, got, want, again, expected, strict=True):
            here = shares.own(side, 0)
            torch.testing.assert_close(g / world, w[here])
            torch.testing.assert_close(h, e[here], rtol=1e-8, atol=1e-10)
            assert e.any()


@case
def of_keys_and_values_the_own_rows_stay_for_backward(rank: int, world: int) -> None:
    for mechanism in ("fusion", "standalone"):
        model, kept = Model(gather=True, candidates=2, mechanism=mechanism), []

        def keep(x: Tensor, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x)
            return x

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
            recorded(hrem_layers.distributed.shares, "gather_shared") as gathered,
        ):
            loss = model(*ragged(world)[rank])
        own = sum(part.shape[0] for part in ragged(world)[rank][:2])
        heads = [x for x in kept if x.dim() == 3 and x.shape[1:] == (2, EMBED // 2)]
        assert heads and all(len(x) <= own and x.untyped_storage().nbytes() == x.nbytes for x in heads)
        with recorded(hrem_layers.distributed.shares, "gather_shared") as again:
            loss.backward()
        assert len(again) == len(gathered) >= 4


@case
def second_derivatives_along_neighbours_of_all(rank: int, world: int) -> None:
    """As those of a streamed loss, below one process's own rows of which the neighbours are any."""
    everyone, own, _, shares = two_sides(rank, world)
    totals = tuple((side, len(x)) for side, x in zip(SIDES, everyone, strict=True))
    generator = torch.Generator().manual_seed(9)
    index = torch.randint(sum(n for _, n in totals), (sum(n for _, n in totals), 3), generator=generator)
    weights = torch.randn(*index.shape, 2, generator=generator, dtype=torch.double)

    def value(images: Tensor, texts: Tensor, rows: Rows, index: Tensor, weights: Tensor) -> Tensor:
        nodes = torch.cat([images, texts]).unflatten(1, (2, 3))
        products = with_all(neighbor_products, nodes.tanh(), nodes, index, rows)
        return (with_all(neighbor_sums, weights + products, nodes.sin(), index, rows) ** 3).sum()

    want_value = value(*everyone, Rows(ALONE, totals), index, weights)
    here = torch.cat([torch.arange(n).split(sizes)[rank] + first for n, sizes, first in
                      zip(map(len, everyone), shares[:2], (0, len(everyone[0])), strict=True)])  # fmt: skip
    got_value = shares.add_up(value(*own, Rows(shares, totals), index[here], weights[here]))
    torch.testing.assert_close(got_value, want_value)
    got = torch.autograd.grad(got_value, own, create_graph=True)
    want = torch.autograd.grad(want_value, everyone, create_graph=True)
    again = torch.autograd.grad(sum((g / world).square().sum() for g in got), own)
    expected = torch.autograd.grad(sum(g.square().sum() for g in want), everyone)
    for side, g, w, h, e in zip(SIDES, got, want, again, expected, strict=True):
        mine = shares.own(side, 0)
        torch.testing.assert_close(g / world, w[mine])
        torch.testing.assert_close(h, e[mine], rtol=1e-8, atol=1e-10)
        assert e.any()


class OwnTripletLoss(TripletLoss):
    """A loss of the user's own that streams and knows of no exchange: gradients of all rows are asked of it."""

    def from_embeddings(self, image, text, *, image_ids, text_ids, image_rows=ALL, text_rows=ALL, normalize=True):
        assert image.requires_grad and text.requires_grad and not normalize
        self.calls = getattr(self, "calls", 0) + 1
        similarity, positives = image @ text.t(), image_ids.unsqueeze(1) == text_ids
        total = similarity.new_zeros(())
        for s, p, rows in ((similarity, positives, image_rows), (similarity.t(), positives.t(), text_rows)):
            worst = s.masked_fill(p, -2).amax(dim=1, keepdim=True)
            total = total + ((0.2 - s + worst).clamp(min=0) * p)[rows].sum()
        return total


@case
def equal_with_a_streamed_loss_of_the_users_own(rank: int, world: int) -> None:
    pair_loss = OwnTripletLoss(negative_sampling="hardest")
    check_equal(rank, ragged(world), candidates=2, pair_loss=pair_loss)
    assert pair_loss.calls == 8, "four of one process, four of several"


@case
def gradients_are_as_large_as_the_own_rows(rank: int, world: int) -> None:
    """But for the enhanced embeddings, which a module hands over as those of all, nothing is filled up with zeros."""
    model = Model(gather=True, candidates=2)
    with (
        recorded(hrem_layers.distributed.shares, "take_own") as taken,
        recorded(hrem_layers.distributed.shares, "share") as shared,
    ):
        model(*ragged(world)[rank])
    assert sum(x.requires_grad for x, _ in taken) == 2
    assert [x.dtype for _, x, _ in shared] == [torch.double] * 2, "cosines within a modality"


@case
def equal_during_warmup_and_after(rank: int, world: int) -> None:
    parts = even(world)
    expected, model = Model(gather=False, warmup_steps=1), Model(gather=True, warmup_steps=1)
    losses = [(model(*parts[rank]), expected(*whole(parts))) for _ in range(2)]
    for got, want in losses:
        torch.testing.assert_close(got, want)
    assert losses[1][0] > 2 * losses[0][0]
    assert model.loss.step.item() == 2
    on_lists = Model(gather=True, warmup_steps=1, candidates=2)
    torch.testing.assert_close(on_lists(*parts[rank]), losses[0][0])


class Encoder(nn.Module):
    """One side's linear map with its pooling, as an encoder of micro-batches."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        fragments = self.linear(x)
        return masked_mean(fragments, mask), fragments, mask


@case
def equal_in_two_passes_over_micro_batches(rank: int, world: int) -> None:
    options = {"pair_loss": "distance_weighted", "dropout": 0.3, "detach_fragments": False}
    parts = ragged(world)
    expected, model = Model(gather=False, **options), Model(gather=True, **options)
    torch.manual_seed(3)
    expected_loss = expected(*whole(parts))
    expected_loss.backward()
    wrap = nn.parallel.DistributedDataParallel
    loss, encoders = wrap(model.loss), [wrap(Encoder(model.images)), wrap(Encoder(model.texts))]
    images, texts, *masks, ids = parts[rank]
    image_mask, text_mask = (
        torch.ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
        for x, mask in zip((images, texts), masks, strict=True)
    )
    torch.manual_seed(3 + 100 * rank)
    got = gradient_cached_backward(
        lambda i, t: loss(i[0], t[0], i[1], t[1], i[2], t[2], ids), encoders,
        [(images, image_mask), (texts, text_mask)], micro_batch_size=2,
    )  # fmt: skip
    compare(model, expected, got, expected_loss.detach())


@case
def equal_in_eval_mode_without_gradient(rank: int, world: int) -> None:
    parts = ragged(world)
    expected, model = Model(gather=False, dropout=0.3).eval(), Model(gather=True, dropout=0.3).eval()
    with torch.no_grad():
        got, want = model.loss.terms(*model.embed(*parts[rank])), expected.loss.terms(*expected.embed(*whole(parts)))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


@case
def equal_over_two_accumulated_steps(rank: int, world: int) -> None:
    first, second = even(world), even(world, n=2)
    expected, model = Model(gather=False, detach_fragments=False), Model(gather=True, detach_fragments=False)
    wrapped = nn.parallel.DistributedDataParallel(model)
    with wrapped.no_sync():
        wrapped(*first[rank]).backward()
    loss = wrapped(*second[rank])
    loss.backward()
    expected(*whole(first)).backward()
    expected_loss = expected(*whole(second))
    expected_loss.backward()
    compare(model, expected, loss, expected_loss)


@case
def equal_under_fsdp2(rank: int, world: int) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    parts = ragged(world)
    for split in (False, True):  # everything in one group of parameters, or each relation module in its own
        expected, model = Model(gather=False, detach_fragments=False), Model(gather=True, detach_fragments=False)
        mesh = init_device_mesh("cpu", (world,))
        if split:
            for part in (model.loss.graph, model.loss.interaction, model.loss):
                fully_shard(part, mesh=mesh)
            register_fsdp_forward_method(model.loss, "terms")
        fully_shard(model, mesh=mesh)
        loss, expected_loss = model(*parts[rank]), expected(*whole(parts))
        loss.backward()
        expected_loss.backward()
        compare(model, expected, loss, expected_loss)
    terms = model.loss.terms(*(None if x is None else x.detach() for x in expected.embed(*parts[rank])))
    torch.testing.assert_close(terms.total, expected_loss)


@case
def equal_under_compile(rank: int, world: int) -> None:
    parts = ragged(world)
    for candidates in (None, 2):
        options = {"detach_fragments": False, "candidates": candidates}
        expected, model = Model(gather=False, **options), Model(gather=True, **options)
        wrapped = nn.parallel.DistributedDataParallel(model)
        torch._dynamo.reset()
        model.loss.compile(backend="aot_eager")
        loss, expected_loss = wrapped(*parts[rank]), expected(*whole(parts))
        loss.backward()
        expected_loss.backward()
        compare(model, expected, loss, expected_loss)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 1  # it did not just run eagerly


@contextlib.contextmanager
def recorded(module: object, name: str) -> Iterator[list[tuple]]:
    """The arguments of every call of ``module.name``."""
    original, calls = getattr(module, name), []

    def record(*args: object, **options: object) -> object:
        calls.append(args)
        return original(*args, **options)

    setattr(module, name, record)
    try:
        yield calls
    finally:
        setattr(module, name, original)


@case
def alignment_is_done_once_over_the_ranks(rank: int, world: int) -> None:
    for widest_images in (4, 9):  # texts stay, images stay
        parts = ragged(world, widest_images=widest_images)
        with recorded(hrem_layers.cross_modal, "align_fragments") as calls:
            Model(gather=True)(*parts[rank])
        ((images, texts, *_),) = calls
        n, own = sum(part[0].shape[0] for part in parts), parts[rank][0].shape[0]
        assert (images.shape[0], texts.shape[0]) == ((n, own) if widest_images == 4 else (own, n))


@case
def candidates_are_aligned_once_over_the_ranks(rank: int, world: int) -> None:
    parts = ragged(world)
    with recorded(hrem_layers.cross_modal, "align_candidates") as calls:
        Model(gather=True, candidates=2)(*parts[rank])
    assert [call[4].shape for call in calls] == [(parts[rank][0].shape[0], 2)] * 2


@case
def candidates_come_in_parts_where_they_are_more_than_a_share(rank: int, world: int) -> None:
    """With the numbers that are no burden set to none: nobody then holds more than a quarter of what it has itself."""
    shares, empty = hrem_layers.distributed.shares, ragged(world)
    empty[-1] = tuple(None if x is None else x[:0] for x in empty[-1])
    least, shares._LEAST = shares._LEAST, {"cpu": 1}
    try:
        for parts in (ragged(world), even(world, 5), empty):
            with recorded(hrem_layers.cross_modal, "align_in_parts") as calls, recorded(shares, "fetch") as fetched:
                check_equal(rank, parts, candidates=3, detach_fragments=True)
            own = parts[rank][0].shape[0]
            assert len(calls) == 2, "both directions"
            assert max(sum(path.received) for _, path in fetched) <= max(1, own // 4)
        with recorded(hrem_layers.cross_modal, "align_in_parts") as calls:
            check_equal(rank, even(world, 5), candidates=3, detach_fragments=False)
        assert not calls, "backward needs all of them"
    finally:
        shares._LEAST = least


@case
def backward_is_silent_where_fragments_are_detached(rank: int, world: int) -> None:
    collectives = [
        name for name in ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single",
                          "reduce_scatter_tensor", "all_reduce", "broadcast") if hasattr(dist, name)
    ]  # fmt: skip
    for detach, sent in ((True, 0), (False, 1)):
        loss = Model(gather=True, detach_fragments=detach)(*even(world)[rank])
        with contextlib.ExitStack() as stack:
            calls = [stack.enter_context(recorded(dist, name)) for name in collectives]
            loss.backward()
        assert sum(map(len, calls)) == sent


@case
def every_rank_keeps_its_own_random_stream(rank: int, world: int) -> None:
    model = Model(gather=True, pair_loss="distance_weighted", dropout=0.3)
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    model(*even(world)[rank])
    assert torch.equal(before, torch.get_rng_state()) == (rank != 0)


def refused_everywhere(rank: int, guilty: int, message: str, change: Callable[[list], None]) -> None:
    """All ranks must raise; and be in step afterwards."""
    parts = ragged(dist.get_world_size())
    model = Model(gather=True, detach_fragments=False)
    arguments = list(model.embed(*parts[rank]))
    if rank == guilty:
        change(arguments)
    try:
        model.loss(*arguments)
    except (TypeError, ValueError) as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError("not refused")
    total = torch.ones(())
    dist.all_reduce(total)
    assert total.item() == dist.get_world_size()


REFUSED = {
    "ids_on_one_rank": ("image_ids must be given on all processes or on none, got ", 6, lambda x: None),
    "ids_of_the_wrong_shape": ("image_ids must have shape", 6, lambda x: x[:-1]),
    "no_tensor": ("image_embedding must be a tensor", 0, lambda x: x.tolist()),
    "embeddings_of_another_size": ("image_embedding must have shape", 0, lambda x: x[:, :-1]),
    "fewer_texts_than_images": ("text_embedding must have shape", 1, lambda x: x[:-1]),
    "embedding_of_another_dtype": ("image_embedding must have the same dtype", 0, lambda x: x.float()),
    "fragments_of_another_dtype": ("text_fragments must have the same dtype", 3, lambda x: x.float()),
    "fragments_of_another_size": ("text_fragments must have shape", 2, lambda x: x[:, :, :-1]),
    "fragments_of_other_items": ("image_fragments must have shape", 2, lambda x: x[:-1]),
    "no_fragments": ("text_fragments must be at least 1 wide", 3, lambda x: x[:, :0]),
    "integer_fragments": ("text_fragments must be a floating-point", 3, lambda x: x.long()),
    "mask_of_the_wrong_shape": ("text_mask must have shape", 5, lambda x: torch.ones(1, 1, dtype=torch.bool)),
    "mask_of_numbers": ("image_mask must be a bool tensor", 4, torch.Tensor.double),
    "embeddings_detached_on_one_rank": ("image_embedding must require gradients on all", 0, lambda x: x.detach()),
    "gradients_on_one_rank": ("image_fragments must require gradients on all", 2, lambda x: x.detach()),
}  # fmt: skip
for _name, (_message, _place, _make) in REFUSED.items():

    def _refused(rank: int, world: int, message: str = _message, place: int = _place, make: Callable = _make) -> None:
        def change(arguments: list) -> None:
            arguments[place] = make(arguments[place])

        refused_everywhere(rank, 1, message, change)

    _refused.__name__ = f"refused_{_name}"
    case(_refused)


@case
def refused_training_and_eval_together(rank: int, world: int) -> None:
    model = Model(gather=True).train(rank != 0)
    try:
        model(*even(world)[rank])
    except ValueError as error:
        assert "must be in training mode on all processes or on none, got no on rank 0, yes on rank 1" in str(error)
    else:
        raise AssertionError("not refused")


@case
def the_error_names_the_rank(rank: int, world: int) -> None:
    refused_everywhere(
        rank, 1, "text_mask must" if rank == 1 else "on rank 1: text_mask must",
        lambda arguments: arguments.__setitem__(5, torch.ones(1, 1)),
    )  # fmt: skip


def work(rank: int, world: int, folder: str, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world, timeout=TIMEOUT)
    results = {}
    for name in names:
        print(f"{time.monotonic():.1f} rank {rank}: {name}", flush=True)  # the last line tells where a process died
        try:
            CASES[name](rank, world)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
    sys.stdout.flush()
    # All is written. The interpreter's own end would now and then abort: gloo's threads may outlive their owner there
    # ("terminate called without an active exception").
    os._exit(0)


def main() -> None:
    world, out = int(sys.argv[1]), Path(sys.argv[2])
    names = sys.argv[3:] or [name for name in CASES if name not in SLOW]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, (world, folder, names), nprocs=world)
        by_rank = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]
    results = {}
    for name in names:
        wrong = [f"rank {rank}:\n{found[name]}" for rank, found in enumerate(by_rank) if found[name] is not None]
        results[name] = "\n".join(wrong) or None
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
