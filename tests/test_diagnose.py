"""Each trouble, made on purpose, is named with its numbers and a remedy; a healthy training is left in peace."""

from __future__ import annotations

import copy
import doctest
import math

import pytest
import torch
from torch import Tensor, nn

from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationGraph, RelationInteraction, TripletLoss, tools
from hrem_layers.tools import Diagnosis, diagnose

N, R, W, D = 16, 9, 6, 32


def batch(n: int = N, *, seed: int = 0, noise: float = 0.5) -> list[Tensor]:
    """Pairs that resemble each other: embeddings, fragments."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    regions = draw(n, R, D)
    words = regions[:, :W] + noise * draw(n, W, D)
    return [regions.mean(1), words.mean(1), regions, words]


def lengths_mask(n: int = N, longest: int = W) -> Tensor:
    """True = real; the first row is whole."""
    return torch.arange(longest) < (longest - torch.arange(n) % (longest - 1)).unsqueeze(1)


def padded(fragments: Tensor, mask: Tensor, padding: Tensor | float = 0.0) -> Tensor:
    return torch.where(mask.unsqueeze(2), fragments, padding)


def healthy(pair_loss: nn.Module, **options) -> tuple[HREMLoss, list[Tensor], Tensor, list[dict]]:
    """A loss, a batch, its mask, and what was logged, after some steps that made the base term fall."""
    torch.manual_seed(0)
    encoders = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
    loss = HREMLoss(D, pair_loss=pair_loss, **options)
    parameters = [*encoders.parameters(), *loss.parameters()]
    optimizer, mask, history = torch.optim.AdamW(parameters, lr=2e-3), lengths_mask(), []
    for step in range(15):
        _, _, regions, words = batch(seed=step)
        given = encode(encoders, regions, padded(words, mask), mask)
        terms = loss.terms(*given, text_mask=mask)
        optimizer.zero_grad()
        terms.total.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1e6)
        optimizer.step()
        history.append({**{name: value.item() for name, value in terms._asdict().items()}, "grad_norm": norm.item()})
    assert history[-1]["base"] < history[0]["base"]
    _, _, regions, words = batch(seed=1000)
    return loss, [x.detach() for x in encode(encoders, regions, padded(words, mask), mask)], mask, history


def encode(encoders: nn.ModuleList, regions: Tensor, words: Tensor, mask: Tensor) -> list[Tensor]:
    regions, words = encoders[0](regions), padded(encoders[1](words), mask)
    return [regions.mean(1), words.sum(1) / mask.sum(1, keepdim=True), regions, words]


PAIR_LOSSES = [
    TripletLoss(), TripletLoss(reduction="mean"), TripletLoss(negative_sampling="all", reduction="mean"),
    TripletLoss(negative_sampling="expected"), TripletLoss(negative_sampling="hardest"), InfoNCELoss(),
]  # fmt: skip


@pytest.mark.parametrize("pair_loss", PAIR_LOSSES, ids=str)
def test_a_healthy_training_gives_nothing(pair_loss: nn.Module) -> None:
    mechanism = "standalone" if isinstance(pair_loss, InfoNCELoss) else "fusion"
    loss, given, mask, history = healthy(pair_loss, interaction=RelationInteraction(D, mechanism=mechanism))
    found = diagnose(loss, *given, text_mask=mask, history=history, max_grad_norm=1e6)
    assert found == [], str(found)
    assert str(found) == "Nothing found."


def names(*args, loss: nn.Module | None = None, **keywords) -> list[str]:
    torch.manual_seed(0)
    found = diagnose(HREMLoss(D) if loss is None else loss, *args, **keywords)
    assert isinstance(found, Diagnosis) and isinstance(found, list)
    for finding in found:
        assert any(c.isdigit() for c in finding.seen), finding
        assert len(finding.remedy) > 40
        assert finding.name in str(found)
    return found.names


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("how", ["equal", "nearly equal", "a line"])
def test_collapsed_embeddings(side: int, how: str) -> None:
    given = batch()
    one = torch.randn(D, generator=torch.Generator().manual_seed(5))
    if how == "a line":
        given[side] = one * torch.linspace(-1, 1, N).unsqueeze(1)
    else:
        given[side] = one + (1e-2 * given[side] if how == "nearly equal" else 0 * given[side])
    found = names(*given)
    assert "collapsed embeddings" in found
    assert "collapsed enhanced embeddings" not in found


class Constant(nn.Module):
    """What the relation modules become when they collapse."""

    def forward(self, v: Tensor, u: Tensor, graph: RelationGraph) -> tuple[Tensor, Tensor]:
        one = torch.linspace(0, 1, v.shape[1])
        return one + 1e-4 * v, one + 1e-4 * u


def test_collapsed_enhanced_embeddings() -> None:
    found = names(*batch(), loss=HREMLoss(D, interaction=Constant()))
    assert found[0] == "collapsed enhanced embeddings"
    assert "hinge at the margin" in found
    assert "collapsed embeddings" not in found


@pytest.mark.parametrize(
    ("reduction", "value", "words"), [("sum", 2 * N * 0.3, f"2·N·margin = 2·{N}·0.3"), ("mean", 0.6, "2·margin = 0.6")]
)
@pytest.mark.parametrize("sampling", ["hardest", "distance_weighted", "expected"])
def test_hinge_at_the_margin(reduction: str, value: float, words: str, sampling: str) -> None:
    _, _, regions, texts = batch()
    one = torch.ones(N, D)
    loss = HREMLoss(D, pair_loss=TripletLoss(0.3, negative_sampling=sampling, reduction=reduction))
    found = diagnose(loss, one, one, regions, texts)
    (hinge,) = (finding for finding in found if finding.name == "hinge at the margin")
    assert f"base is {value:.4g}" in hinge.seen and words in hinge.seen


def test_a_pair_loss_that_never_left_the_margin() -> None:
    """By the history, though the similarities of this batch are not equal."""
    given, value = batch(), 2 * N * 0.2
    stuck = [{"base": value * (1 + 0.005 * (-1) ** step)} for step in range(20)]
    assert "hinge at the margin" in names(*given, history=stuck)
    assert "hinge at the margin" not in names(*given, history=[{"base": value * 0.8**step} for step in range(20)])
    assert "hinge at the margin" not in names(*given, history=stuck[:5])


def test_a_loss_of_another_kind_at_chance() -> None:
    _, _, regions, texts = batch()
    one = torch.ones(N, D)
    found = diagnose(HREMLoss(D, pair_loss=InfoNCELoss()), one, one, regions, texts)
    (chance,) = (finding for finding in found if finding.name == "pair loss at chance")
    assert f"{2 * math.log(N):.4g}" in chance.seen or f"{math.log(N):.4g}" in chance.seen


class Edges(AssociationGraph):
    """Its own edges replaced by others."""

    def __init__(self, connect) -> None:
        super().__init__()
        self.connect = connect

    def forward(self, *args, **keywords) -> RelationGraph:
        graph = super().forward(*args, **keywords)
        return graph._replace(connection=self.connect(graph.connection))


@pytest.mark.parametrize(
    "graph",
    [AssociationGraph(neighbor_ratio=0.01), Edges(torch.zeros_like), Edges(lambda a: torch.eye(len(a)).bool())],
    ids=["one neighbour", "none", "itself"],
)
def test_a_graph_that_is_nearly_empty(graph: nn.Module) -> None:
    found = names(*batch(), loss=HREMLoss(D, graph=graph))
    assert "graph nearly empty" in found and "graph nearly full" not in found


def test_a_graph_without_edges_across() -> None:
    def within(a: Tensor) -> Tensor:
        return torch.block_diag(*(torch.ones(N, N),) * 2).bool() & a

    assert "graph nearly empty" in names(*batch(), loss=HREMLoss(D, graph=Edges(within)))


@pytest.mark.parametrize("graph", [AssociationGraph(neighbor_ratio=1.0), Edges(torch.ones_like)], ids=["ratio", "own"])
def test_a_graph_that_is_nearly_full(graph: nn.Module) -> None:
    found = names(*batch(), loss=HREMLoss(D, graph=graph))
    assert "graph nearly full" in found and "graph nearly empty" not in found


@pytest.mark.parametrize("sigma", [1e4, 1e-3])
def test_flat_relevance_within_a_modality(sigma: float) -> None:
    found = diagnose(HREMLoss(D, graph=AssociationGraph(sigma=sigma)), *batch())
    (flat,) = (finding for finding in found if finding.name == "flat relevance")
    assert "i2i" in flat.seen and "t2t" in flat.seen and "i2t" not in flat.seen


def test_flat_relevance_across_the_modalities() -> None:
    v, u, regions, words = batch()
    found = diagnose(HREMLoss(D), v, u, torch.ones_like(regions), torch.ones_like(words) + 1e-3 * words)
    (flat,) = (finding for finding in found if finding.name == "flat relevance")
    assert "i2t" in flat.seen and "t2i" in flat.seen and "i2i" not in flat.seen


def test_relevance_that_is_not_looked_at() -> None:
    loss = HREMLoss(D, interaction=RelationInteraction(D, relation_weight=0))
    assert "flat relevance" in names(*batch(), loss=loss)


@pytest.mark.parametrize(("weight", "name"), [(1e6, "regulariser too large"), (1e-5, "regulariser too small")])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_a_regulariser_out_of_proportion(weight: float, name: str, reduction: str) -> None:
    opened = {"pair_loss": TripletLoss(reduction=reduction), "interaction": RelationInteraction(D, gate=0.5)}
    loss = HREMLoss(D, **opened, regularization_weight=weight)
    given = batch(noise=4.0)
    found = diagnose(loss, *given)
    (finding,) = (x for x in found if x.name.startswith("regulariser"))
    assert finding.name == name and "regularization_weight" in finding.remedy
    wished = float(finding.remedy.split(", to ")[1].split(" say")[0])
    better = HREMLoss(D, **opened, regularization_weight=wished)
    better.load_state_dict(loss.state_dict())
    assert not [x for x in diagnose(better, *given) if x.name.startswith("regulariser")]


def test_a_regulariser_that_outweighs_even_what_was_learned() -> None:
    """The pair terms are 0 on this batch: that alone makes no other term too large."""
    given = batch(noise=0.1)
    assert names(*given, loss=HREMLoss(D)) == []
    assert "regulariser too large" in names(*given, loss=HREMLoss(D, regularization_weight=1e6))


def test_anchors_that_have_nobody() -> None:
    given = batch()
    assert "anchors without candidates" in names(*given, image_ids=torch.zeros(N, dtype=torch.long))
    assert "anchors without candidates" in names(*given, positives=torch.zeros(N, N, dtype=torch.bool))
    assert "anchors without candidates" not in names(*given, image_ids=torch.arange(N) // 2)
    far = torch.eye(D)[:N]
    loss = HREMLoss(D, pair_loss=TripletLoss(nonzero_cutoff=1.2))  # orthogonal embeddings are 1.41 apart
    assert "anchors without candidates" in names(far, far, *given[2:], loss=loss)

    def nobody(similarity: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
        return similarity[:, :1], torch.zeros_like(positives[:, :1])

    loss = HREMLoss(D, pair_loss=TripletLoss(negative_sampling=nobody))
    assert "anchors without candidates" in names(*given, loss=loss)


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("padding", [0.0, 0.7], ids=["zeros", "a vector"])
def test_an_inverted_mask(side: str, padding: float) -> None:
    given = batch()
    place, longest = (2, R) if side == "image" else (3, W)
    mask = lengths_mask(longest=longest)
    given[place] = padded(given[place], mask, padding)
    assert not [x for x in names(*given, **{f"{side}_mask": mask}) if "mask" in x or "fragments" in x or "padding" in x]
    assert "inverted mask" in names(*given, **{f"{side}_mask": ~mask})


def test_an_inverted_mask_whose_padding_differs() -> None:
    """Contextual states at padding, all rows shorter than the batch is wide: only the mask's form tells."""
    given = batch()
    mask = torch.arange(W) < torch.arange(N).unsqueeze(1) % 3 + 2
    assert "inverted mask" in names(*given, text_mask=~mask)
    assert "inverted mask" not in names(*given, text_mask=mask)


def test_padding_on_the_left_is_no_trouble() -> None:
    given, mask = batch(), lengths_mask().flip(1)
    assert names(*given, text_mask=mask) == []
    given[3] = padded(given[3], mask, 0.3)
    assert names(*given, text_mask=mask) == []
    short = torch.arange(W).flip(0) < torch.arange(N).unsqueeze(1) % 3 + 2  # no row is whole
    given = batch()
    given[3] = padded(given[3], short, 0.3)
    assert "inverted mask" not in names(*given, text_mask=short)


@pytest.mark.parametrize("padding", [0.0, 0.7], ids=["zeros", "a vector"])
@pytest.mark.parametrize("flip", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("none", [False, True], ids=["all True", "None"])
def test_a_mask_that_calls_padding_real(padding: float, flip: bool, none: bool) -> None:
    given, mask = batch(), lengths_mask()
    given[3] = padded(given[3], mask.flip(1) if flip else mask, padding)
    assert "padding counts as real" in names(*given, text_mask=None if none else torch.ones_like(mask))


def test_samples_without_fragments() -> None:
    mask = lengths_mask()
    mask[3:5] = False
    found = diagnose(HREMLoss(D), *batch(), text_mask=mask)
    (empty,) = (x for x in found if x.name == "samples without fragments")
    assert empty.seen.startswith(f"2 of {N} rows of text_mask")


def test_clipping_that_is_always_active() -> None:
    given = batch()
    norms = [{"grad_norm": 50.0 + step} for step in range(20)]
    found = diagnose(HREMLoss(D), *given, history=norms, max_grad_norm=2.0)
    assert "clipping always active" in found.names and "20 of 20 steps" in str(found)
    assert "clipping always active" not in names(*given, history=norms, max_grad_norm=60.0)
    assert "clipping always active" not in names(*given, history=norms)
    assert "clipping always active" not in names(*given, history=norms[:5], max_grad_norm=2.0)


@pytest.mark.parametrize("place", range(4))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_non_finite_input(place: int, value: float) -> None:
    given = batch()
    given[place].view(-1)[D + 1] = value
    found = diagnose(HREMLoss(D), *given)
    assert found.names == ["non-finite values"]
    name = ("image_embedding", "text_embedding", "image_fragments", "text_fragments")[place]
    assert name in found[0].seen and "1 of" in found[0].seen


def test_padding_may_hold_anything() -> None:
    given, mask = batch(), lengths_mask()
    given[3] = padded(given[3], mask, math.nan)
    assert names(*given, text_mask=mask) == []


def test_non_finite_parameters_gradients_and_history() -> None:
    loss, given = HREMLoss(D), batch()
    assert names(*given, loss=loss, history=[{"total": 1.0}, {"total": math.nan}]) == ["non-finite values"]
    first = next(loss.parameters())
    first.grad = torch.full_like(first, math.inf)
    assert names(*given, loss=loss) == ["non-finite values"]
    first.grad = None
    first.data.view(-1)[0] = math.nan
    assert names(*given, loss=loss) == ["non-finite values"]


def test_the_loss_is_left_as_it_was() -> None:
    options = {"gather_distributed": True, "cross_pair_loss": InfoNCELoss(learnable=True)}
    loss, given = HREMLoss(D, warmup_steps=5, **options), batch()
    loss.interaction.eval()
    loss.graph.requires_grad_(False)
    before, state = copy.deepcopy(loss.state_dict()), torch.get_rng_state()
    diagnose(loss, *given)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(x, before[name]) for name, x in loss.state_dict().items())
    assert loss.training and loss.gather_distributed and not loss.interaction.training
    assert all(p.grad is None for p in loss.parameters())
    loss(*given)
    assert int(loss.step) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"enhanced_weight": 0, "cross_weight": 0, "regularization_weight": 0},
        {"enhanced_weight": 0, "cross_weight": 0},
        {"enhanced_weight": 0, "regularization_weight": 0},
        {"graph": AssociationGraph(candidates=6)},
        {"graph": AssociationGraph(exclude_positives=True)},
    ],
    ids=str,
)
def test_whatever_the_loss_is_made_of(options: dict) -> None:
    assert names(*batch(), loss=HREMLoss(D, **options)) == []


@pytest.mark.parametrize("n", [1, 2, 3])
def test_small_batches(n: int) -> None:
    assert not {"graph nearly empty", "graph nearly full", "collapsed embeddings"} & set(names(*batch(n)))


def test_several_captions_wrapped_losses_and_half_types() -> None:
    v, u, regions, words = batch()
    index = torch.arange(N) // 4
    assert names(v[:4], u, regions[:4], words, image_index=index) is not None
    loss = HREMLoss(D)
    wrapped = nn.Module()
    wrapped.module = loss
    assert names(v, u, regions, words, loss=wrapped) == []
    halves = [x.to(torch.bfloat16) for x in (v, u, regions, words)]
    assert names(*halves, loss=loss) == []
    assert names(*(x.double() for x in (v, u, regions, words)), loss=loss) == []


def test_other_arguments_are_refused_in_one_line() -> None:
    given = batch()
    with pytest.raises(TypeError, match="loss must be an HREMLoss"):
        diagnose(nn.Linear(2, 2), *given)
    with pytest.raises(ValueError, match="text_embedding"):
        diagnose(HREMLoss(D), given[0], given[1][:3], *given[2:])
    for history in ("a", 3, {"base": 1.0}):
        with pytest.raises(TypeError, match="history must be a sequence"):
            diagnose(HREMLoss(D), *given, history=history)
    with pytest.raises(TypeError, match=r"history\[1\] must be"):
        diagnose(HREMLoss(D), *given, history=[{"base": 1.0}, 2.0])
    with pytest.raises(TypeError, match=r"history\[0\] must hold numbers"):
        diagnose(HREMLoss(D), *given, history=[{"base": "low"}])
    with pytest.raises(ValueError, match="max_grad_norm"):
        diagnose(HREMLoss(D), *given, history=[], max_grad_norm=0)


def test_terms_can_be_logged_as_they_come() -> None:
    loss, given = HREMLoss(D), batch()
    assert diagnose(loss, *given, history=[loss.terms(*given) for _ in range(3)]).names == names(*given, loss=loss)


@pytest.mark.parametrize("name", ["Diagnosis", "Finding", "diagnose"])
def test_examples(name: str) -> None:
    for test in doctest.DocTestFinder().find(getattr(tools, name), name):
        assert not doctest.DocTestRunner().run(test).failed
