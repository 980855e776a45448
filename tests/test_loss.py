"""HREMLoss: its terms and weights, warm-up and what of it a checkpoint holds, padding, order, numerics."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, batch, gradients, repad
from torch import nn
from torch.nn.functional import normalize

from hrem_layers import (
    AssociationGraph,
    HREMLoss,
    HREMTerms,
    InfoNCELoss,
    RelationInteraction,
    TripletLoss,
)
from hrem_layers.losses import negatives

DOUBLE, D = torch.float64, 8
PAIR_LOSSES = {
    "hardest": lambda: TripletLoss(negative_sampling="hardest"),
    "all": lambda: TripletLoss(negative_sampling="all"),
    "expected": lambda: TripletLoss(negative_sampling="expected", weight_dim=8),
    "infonce": lambda: InfoNCELoss(0.5),
}


def hrem(pair_loss="hardest", *, mechanism="fusion", graph=None, dropout=0.0, dtype=DOUBLE, **options):
    torch.manual_seed(1)
    return HREMLoss(
        D,
        graph=AssociationGraph(**{"topk": 3, "detach_fragments": False, **(graph or {})}),
        interaction=RelationInteraction(D, num_heads=2, mechanism=mechanism, dropout=dropout, gate=0.6),
        pair_loss=PAIR_LOSSES[pair_loss]() if isinstance(pair_loss, str) else pair_loss,
        **options,
    ).to(dtype)


def inputs(**options):
    return batch(**{"dim": D, "dtype": DOUBLE, **options})


def all_gradients(module, b, value):
    return gradients({**b, **dict(module.named_parameters())}, value)


def assert_same_gradients(actual, expected, tolerance):
    """Relative to the largest of each, but of nothing under 1e-3: some are 0 but for rounding. (In the standalone
    mechanism a constant over all i2t relevances, such as the MLP's last bias, cancels in the softmax.)"""
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        assert torch.isfinite(actual[name]).all(), name
        error = (actual[name] - grad).abs().max().item()
        assert error <= tolerance * max(1e-3, grad.abs().max().item()), (name, error)


def by_hand(module, b, pair):
    """The terms from the parts, as the definition of the loss puts them together."""
    v, u, r, c, r_mask, c_mask, ids = b.values()
    v, u = normalize(v, dim=1), normalize(u, dim=1)
    graph = module.graph(v, u, r, c, r_mask, c_mask)
    v_, u_ = (normalize(x, dim=1) for x in module.interaction(v, u, graph))
    positives = torch.tensor([[i == j for j in ids.tolist()] for i in ids.tolist()])
    return {
        "base": pair(v @ u.t(), positives),
        "enhanced": pair(v_ @ u_.t(), positives),
        "cross_image": pair(v_ @ u.t(), positives),
        "cross_text": pair(v @ u_.t(), positives),
        "regularization": module.graph.regularization(graph, v, u),
    }


@pytest.mark.parametrize("pair_loss", PAIR_LOSSES)
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
def test_terms_and_total(pair_loss, mechanism):
    weights = {"enhanced_weight": 0.3, "cross_weight": 1.7, "regularization_weight": 5.0}
    module, b = hrem(pair_loss, mechanism=mechanism, **weights), inputs()
    terms, expected = module.terms(**b), by_hand(module, b, module.pair_loss)
    assert isinstance(terms, HREMTerms)
    for name, value in expected.items():
        assert getattr(terms, name).shape == ()
        assert_near(getattr(terms, name), value, 1e-12, name)
    total = (
        expected["base"] + 0.3 * expected["enhanced"]
        + 1.7 * (expected["cross_image"] + expected["cross_text"]) + 5.0 * expected["regularization"]
    )  # fmt: skip
    assert_near(terms.total, total, 1e-12)
    assert torch.equal(module(**b), terms.total)
    ours, theirs = all_gradients(module, b, terms.total), all_gradients(module, b, total)
    assert_same_gradients(ours, theirs, 1e-9)
    assert all(grad.any() for name, grad in ours.items() if mechanism == "fusion" or not name.endswith(".2.bias"))


@pytest.mark.parametrize("name", ["enhanced_weight", "cross_weight", "regularization_weight"])
def test_each_weight_scales_its_own_term(name):
    b, zero = inputs(), {"enhanced_weight": 0.0, "cross_weight": 0.0, "regularization_weight": 0.0}
    terms = hrem(**zero).terms(**b)
    assert torch.equal(terms.total, terms.base)
    alone = hrem(**{**zero, name: 2.0}).terms(**b)
    part = {
        "enhanced_weight": alone.enhanced,
        "cross_weight": alone.cross_image + alone.cross_text,
        "regularization_weight": alone.regularization,
    }
    assert_near(alone.total, alone.base + 2 * part[name], 1e-12)
    assert part[name] > 0


def test_equal_ids_are_positives_and_none_means_row_numbers():
    seen = []

    def pair_loss(similarity, positives):
        seen.append(positives)
        return similarity.sum()

    module, b = hrem(pair_loss), inputs(n=4)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        module(**{**b, "image_ids": torch.tensor([7, 3, 7, 200], dtype=dtype)})
        assert seen[-1].tolist() == [
            [True, False, True, False], [False, True, False, False], [True, False, True, False], [False] * 3 + [True],
        ]  # fmt: skip
    module(**{**b, "image_ids": None})
    assert torch.equal(seen[-1], torch.eye(4, dtype=torch.bool))
    assert len(seen) == 16
    assert all(p.dtype == torch.bool for p in seen)


def test_pair_loss_may_be_any_callable():
    def plain(similarity, positives):
        return (similarity - positives.to(similarity.dtype)).square().mean()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0, dtype=DOUBLE))

        def forward(self, similarity, positives):
            return self.scale * plain(similarity, positives)

    b = inputs()
    function, module = hrem(plain), hrem(Scaled())
    assert_near(module(**b), 2 * function(**b) - 10 * function.terms(**b).regularization, 1e-10)
    module(**b).backward()
    assert module.pair_loss.scale.grad.item() > 0
    assert "pair_loss.scale" in module.state_dict()
    assert_near(hrem(plain).terms(**b).base, by_hand(function, b, plain)["base"], 1e-12)


def test_similarities_are_cosines_of_normalised_embeddings():
    seen = []

    def pair_loss(similarity, positives):
        seen.append(similarity)
        return similarity.sum()

    module, b = hrem(pair_loss), inputs()
    module(**b)
    assert all((s.abs() <= 1 + 1e-12).all() for s in seen)
    assert_near(seen[0], normalize(b["image_embedding"], dim=1) @ normalize(b["text_embedding"], dim=1).t(), 1e-12)
    scaled = {**b, "image_embedding": 5 * b["image_embedding"], "text_embedding": b["text_embedding"] / 7}
    assert_near(module(**scaled), module(**b), 1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cosines_are_multiplied_in_float32_under_autocast_and_in_half_modules(dtype):
    seen = []

    def pair_loss(similarity, positives):
        seen.append(similarity)
        return similarity.square().sum()

    b = inputs(dtype=torch.float32, grad=False)
    unit = {side: normalize(b[f"{side}_embedding"], dim=1) for side in ("image", "text")}
    with torch.autocast("cpu", dtype=dtype):
        hrem(pair_loss, dtype=torch.float32)(**b)
    assert all(s.dtype == torch.float32 for s in seen)
    assert_near(seen[0], unit["image"] @ unit["text"].t(), 1e-6)
    seen.clear()
    hrem(pair_loss, dtype=dtype)(**{name: x.to(dtype) if x.dtype.is_floating_point else x for name, x in b.items()})
    assert all(s.dtype == torch.float32 for s in seen)


# warm-up


def test_warmup_trains_the_plain_embeddings_alone_and_then_everything():
    module, b = hrem(warmup_steps=2), inputs()
    full = hrem().terms(**b)
    for step in range(4):
        terms = module.terms(**b)
        assert_near(terms.enhanced, full.enhanced if step >= 2 else torch.zeros_like(full.enhanced), 1e-12)
        assert_near(terms.total, terms.base if step < 2 else full.total, 1e-12)
        grads = all_gradients(module, b, terms.total)
        relational = [name for name in grads if name.startswith(("graph.", "interaction.")) or "fragments" in name]
        assert all(bool(grads[name].any()) == (step >= 2) for name in relational)
        assert grads["image_embedding"].any()
    assert module.step.item() == 4


def test_warmup_does_not_count_calls_in_eval_mode_nor_act_there():
    module, b = hrem(warmup_steps=2), inputs()
    full = hrem().terms(**b).total
    module(**b)
    module.eval()
    for _ in range(3):
        assert_near(module(**b), full, 1e-12)
    assert module.step.item() == 1
    module.train()
    assert_near(module(**b), module.eval().terms(**b).base, 1e-12)
    assert_near(module.train()(**b), full, 1e-12)


def test_a_call_that_fails_does_not_count():
    module, b = hrem(warmup_steps=2), inputs()
    with pytest.raises(ValueError, match="text_mask"):
        module(**{**b, "text_mask": b["text_mask"][:, :-1]})
    assert module.step.item() == 0


def test_resume_in_mid_warmup():
    b = inputs()
    first = hrem(warmup_steps=3)
    for _ in range(2):
        first(**b)
    second = hrem(warmup_steps=3)
    second.load_state_dict(first.state_dict(), strict=True)
    assert second.step.item() == 2
    for _ in range(3):
        assert torch.equal(first(**b), second(**b))
    assert "step" in first.state_dict()
    assert first.state_dict()["step"].dtype == torch.int64


def test_warmup_hides_a_relational_part_that_is_not_finite():
    module, b = hrem(warmup_steps=1), inputs()
    with torch.no_grad():
        module.graph.mlp_i2t[2].bias.fill_(math.inf)
    assert torch.isfinite(module(**b))


def test_step_follows_half_and_double_as_an_integer():
    for convert in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        assert convert(hrem(warmup_steps=1)).step.dtype == torch.int64


# what may not matter


@settings(max_examples=15)
@given(
    fill=st.sampled_from([None, math.nan, math.inf, -math.inf, 1e300]), extra=st.integers(0, 4),
    seed=st.integers(0, 2**31), mechanism=st.sampled_from(["fusion", "standalone"]),
    pair_loss=st.sampled_from(sorted(PAIR_LOSSES)),
)  # fmt: skip
def test_padding_may_hold_anything_anywhere(fill, extra, seed, mechanism, pair_loss):
    b = inputs(n=4, r=3, w=4, seed=seed)
    module = hrem(pair_loss, mechanism=mechanism)
    wide, back = dict(b), {}
    for side in ("image", "text"):
        leaf, mask, back[f"{side}_fragments"] = repad(
            b[f"{side}_fragments"], b[f"{side}_mask"], fill=fill, extra=extra, seed=seed
        )
        wide |= {f"{side}_fragments": leaf, f"{side}_mask": mask}
    here, there = module(**b), module(**wide)
    assert_near(there, here, 1e-11)
    here_grads, there_grads = all_gradients(module, b, here), all_gradients(module, wide, there)
    for name, at_old_places in back.items():
        assert not there_grads[name][~wide[name.replace("fragments", "mask")]].any()
        there_grads[name] = at_old_places(there_grads[name])
    assert_same_gradients(there_grads, here_grads, 1e-8)


@pytest.mark.parametrize("pair_loss", PAIR_LOSSES)
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
def test_order_of_the_batch(pair_loss, mechanism):
    module, b = hrem(pair_loss, mechanism=mechanism), inputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    here, there = module.terms(**b), module.terms(**{name: x[order] for name, x in b.items()})
    for name, x, y in zip(here._fields, there, here, strict=True):
        assert_near(x, y, 1e-11, name)
    # the leaves come before the reordering, so that their gradients compare as they are
    assert_same_gradients(all_gradients(module, b, there.total), all_gradients(module, b, here.total), 1e-8)


def hold_weights(monkeypatch):
    """The weights of the negatives and the guide of the regulariser are targets, without gradient: for finite
    differences they must stay what they were in the first call."""
    weigh, held = negatives.log_weights, []

    def held_weights(s, positives, *options):
        held.append(weigh(s, positives, *options) if len(held) < 8 else held[len(held) % 8])
        return held[-1]

    monkeypatch.setattr(negatives, "log_weights", held_weights)


@pytest.mark.parametrize("pair_loss", [*PAIR_LOSSES, "distance_weighted"])
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
def test_gradcheck(pair_loss, mechanism, monkeypatch):
    sampled = TripletLoss(0.5, weight_dim=4) if pair_loss == "distance_weighted" else pair_loss
    module, b = hrem(sampled, mechanism=mechanism).eval(), inputs(n=3, r=3, w=3)
    b["image_ids"] = torch.tensor([4, 9, 4])
    if pair_loss in ("distance_weighted", "expected"):
        hold_weights(monkeypatch)
        noise = torch.rand(6, dtype=DOUBLE)
        module.pair_loss.draw_noise = lambda similarity: noise
    v, u, r, c, *rest = b.values()
    names = [name for name, _ in module.named_parameters()]

    def of_all_but_embeddings(r, c, *parameters):
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (v, u, r, c, *rest))

    assert torch.autograd.gradcheck(of_all_but_embeddings, (r, c, *module.parameters()), fast_mode=True)
    module.regularization_weight = 0.0  # its guide depends on the embeddings and has no gradient
    assert torch.autograd.gradcheck(lambda v, u: module(v, u, r, c, *rest), (v, u), fast_mode=True)


# what comes in


@pytest.mark.parametrize("pair_loss", [*PAIR_LOSSES, TripletLoss()])
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
def test_batch_of_one(pair_loss, mechanism):
    module, b = hrem(pair_loss, mechanism=mechanism), inputs(n=1)
    total = module(**b)
    assert total.item() == pytest.approx(0, abs=1e-12)
    assert all(torch.isfinite(x).all() for x in all_gradients(module, b, total).values())


def disasters():
    b = {name: x.detach() for name, x in inputs(n=5).items()}
    third = torch.arange(5) == 2
    zero = {name: x.masked_fill(third.view(5, *[1] * (x.dim() - 1)), 0) for name, x in b.items()}
    yield "items without fragments and zero embeddings", zero
    yield "no real fragment anywhere", {**b, "image_mask": b["image_mask"] & False, "text_mask": b["text_mask"] & False}
    same = b["image_embedding"][:1].expand(5, D)
    yield "identical embeddings", {**b, "image_embedding": same, "text_embedding": same}
    yield "opposite embeddings", {**b, "image_embedding": same, "text_embedding": -same}
    yield "identical everything", {name: x if name == "image_ids" else x[:1].expand_as(x) for name, x in b.items()}
    yield "all negative similarities", {**b, "text_fragments": -b["image_fragments"][:, :1].abs().expand(5, 7, D),
                                        "image_fragments": b["image_fragments"].abs()}  # fmt: skip
    yield "all ids equal", {**b, "image_ids": torch.zeros(5, dtype=torch.long)}
    yield "one word", {**b, "text_fragments": b["text_fragments"][:, :1], "text_mask": None}
    yield "tiny", {name: x * 1e-25 if x.dtype.is_floating_point else x for name, x in b.items()}


@pytest.mark.parametrize(("name", "b"), list(disasters()), ids=[name for name, _ in disasters()])
@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_whatever_comes_value_and_gradient_are_finite(name, b, mechanism, dtype):
    b = {key: x.to(dtype).clone().requires_grad_() if x is not None and x.dtype.is_floating_point else x
         for key, x in b.items()}  # fmt: skip
    for pair_loss in [*PAIR_LOSSES, TripletLoss()]:
        module = hrem(pair_loss, mechanism=mechanism, dtype=dtype)
        total = module(**b)
        assert torch.isfinite(total)
        for leaf, grad in all_gradients(module, b, total).items():
            assert torch.isfinite(grad).all(), (pair_loss, leaf)


@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
@pytest.mark.parametrize("pair_loss", ["hardest", "expected", "infonce"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules(pair_loss, mechanism, dtype):
    b = {name: x.to(dtype) if x.dtype.is_floating_point else x for name, x in inputs(grad=False).items()}
    wide_b = {name: x.float() if x.dtype.is_floating_point else x for name, x in b.items()}
    half = hrem(pair_loss, mechanism=mechanism, dtype=dtype)
    wide = copy.deepcopy(half).float()
    leaf, wide_leaf = (x["image_embedding"].requires_grad_() for x in (b, wide_b))
    total, expected = half(**b), wide(**wide_b)
    assert total.dtype == torch.float32
    assert_near(total, expected, 0.02 if dtype == torch.float16 else 0.1)
    total.backward()
    expected.backward()
    assert leaf.grad.dtype == dtype
    assert all(torch.isfinite(p.grad).all() for p in half.parameters())
    if pair_loss == "infonce":  # smooth: no hinge or maximum that may fall the other way
        assert (leaf.grad.float() - wide_leaf.grad).norm() <= 0.1 * wide_leaf.grad.norm()


@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
@pytest.mark.parametrize("pair_loss", [*PAIR_LOSSES, TripletLoss()])
def test_autocast(pair_loss, mechanism):
    b = inputs(dtype=torch.float32)
    module = hrem(pair_loss, mechanism=mechanism, dtype=torch.float32)
    torch.manual_seed(2)
    plain = module(**b)
    torch.manual_seed(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = module.terms(**b)
    assert all(term.dtype == torch.float32 for term in terms)
    assert_near(terms.total, plain, 0.1)
    grads = all_gradients(module, b, terms.total)
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(grad.dtype == torch.float32 for grad in grads.values())


def test_autocast_takes_what_encoders_return_under_it():
    # one encoder ends in a linear layer (bfloat16), the other in a norm (float32)
    b = inputs(dtype=torch.float32, grad=False)
    module = hrem(dtype=torch.float32)
    mixed = {**b, **{name: b[name].bfloat16() for name in ("image_embedding", "image_fragments")}}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_near(module(**mixed), module(**b), 0.1)


def test_dropout_acts_in_training_only():
    module, b = hrem(dropout=0.5), inputs()
    assert module(**b) != module(**b)
    module.eval()
    assert module(**b) == module(**b)


def test_draws_repeat_under_manual_seed():
    module, b = hrem(TripletLoss(weight_dim=8)), inputs(n=12)
    values = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        values.append(module(**b).item())
    assert values[0] == values[1] != values[2]


def test_inputs_are_left_alone():
    b = inputs()
    before = {name: x.detach().clone() for name, x in b.items()}
    hrem()(**b).backward()
    for name, x in b.items():
        assert torch.equal(x, before[name]), name


def test_defaults():
    module = HREMLoss(32)
    names = "enhanced_weight", "cross_weight", "regularization_weight", "warmup_steps", "gather_distributed"
    assert [getattr(module, name) for name in names] == [1.0, 1.0, 10.0, 0, False]
    assert [type(x) for x in (module.graph, module.interaction, module.pair_loss)] == [
        AssociationGraph, RelationInteraction, TripletLoss,
    ]  # fmt: skip
    assert module.interaction.embed_dim == 32


def test_gather_distributed_without_a_process_group_changes_nothing():
    b = inputs()
    assert torch.equal(hrem(gather_distributed=True)(**b), hrem()(**b))


# what is not needed is not computed


def counted(module, b, *, terms=True):
    """Calls of graph, interaction and regulariser in one call."""
    calls = {"graph": 0, "interaction": 0, "regularization": 0}

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    handles = [getattr(module, name).register_forward_hook(count(name)) for name in ("graph", "interaction")]
    regularization = module.graph.regularization
    module.graph.regularization = lambda *x, **y: count("regularization")() or regularization(*x, **y)
    module(**b)
    del module.graph.regularization
    for handle in handles:
        handle.remove()
    return tuple(calls.values())


@pytest.mark.parametrize(
    ("weights", "expected"),
    [((1, 1, 1), (1, 1, 1)), ((1, 0, 0), (1, 1, 0)), ((0, 1, 0), (1, 1, 0)), ((0, 0, 0), (0, 0, 0)),
     ((0, 0, 1), (1, 0, 1))],
)  # fmt: skip
def test_weights_of_zero_cost_nothing(weights, expected):
    names = "enhanced_weight", "cross_weight", "regularization_weight"
    assert counted(hrem(**dict(zip(names, map(float, weights), strict=True))), inputs()) == expected


def test_the_regularization_is_done_before_the_enhanced_embeddings_are_there():
    """On lists, where no matrix of all pairs stands over them, these are what memory is."""
    module, order = hrem(graph={"candidates": 2}), []
    regularization = module.graph.regularization
    module.graph.regularization = lambda *x, **y: order.append("regularization") or regularization(*x, **y)
    module.interaction.register_forward_hook(lambda *_: order.append("interaction"))
    module(**inputs())
    assert order == ["regularization", "interaction"]


def test_warmup_computes_the_base_term_alone_and_hides_no_gradient():
    module, b = hrem(warmup_steps=1), inputs()
    with torch.no_grad():
        module.graph.mlp_i2t[2].bias.fill_(math.nan)
    total = module(**b)
    total.backward()
    assert torch.isfinite(total)
    assert all(torch.isfinite(x.grad).all() for x in b.values() if x.grad is not None)
    assert b["image_embedding"].grad.any()
    assert all(p.grad is None for p in module.relation_parameters())
    assert counted(hrem(warmup_steps=1), inputs()) == (0, 0, 0)
    assert not torch.isfinite(module(**b))  # after it nothing is hidden


@pytest.mark.parametrize("name", ["image_embedding", "text_embedding", "image_fragments", "text_fragments"])
@pytest.mark.parametrize("pair_loss", [*PAIR_LOSSES, TripletLoss()])
def test_what_is_not_finite_makes_the_loss_not_finite(name, pair_loss):
    b = {key: x.detach().clone() for key, x in inputs().items()}
    place = b[name.replace("fragments", "mask")][1].nonzero()[0] if name.endswith("fragments") else ()
    b[name][(1, *place, 2)] = math.nan
    assert not torch.isfinite(hrem(pair_loss)(**b))
    if name.endswith("embedding"):
        assert not torch.isfinite(hrem(pair_loss, warmup_steps=1)(**b))


class DifferentiatesOnItsWay(torch.nn.Module):
    """As a gradient penalty does: without reentrance, checkpointing then runs the call again before it ends."""

    def forward(self, similarity, positives):
        with torch.enable_grad():
            s = similarity.detach().requires_grad_()
            (slope,) = torch.autograd.grad(s.exp().sum(), s)
        return (slope * similarity).masked_fill(positives, 0).sum()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("pair_loss", ["hardest", DifferentiatesOnItsWay()])
def test_activation_checkpointing_at_the_end_of_the_warmup(pair_loss, reentrant):
    plain, saved = hrem(pair_loss, warmup_steps=2), hrem(pair_loss, warmup_steps=2)
    for step in range(4):
        grads = []
        for module in (plain, saved):
            b = inputs(seed=step)
            if module is saved:
                total = torch.utils.checkpoint.checkpoint(module, *b.values(), use_reentrant=reentrant)
            else:
                total = module(**b)
            total.backward()
            grads.append([x.grad for x in b.values() if x.dtype.is_floating_point and x.requires_grad])
        for x, y in zip(*grads, strict=True):
            assert (x is None and y is None) or torch.equal(x, y), step
    assert plain.step.item() == saved.step.item() == 4


def test_warmup_compiles_in_one_graph_per_phase():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    module, b = hrem(warmup_steps=3), inputs()
    twin = copy.deepcopy(module)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    for _ in range(7):
        assert_near(compiled(**b), twin(**b), 1e-12)
    assert len(graphs) == 2
    assert module.step.item() == 7


def test_a_copy_counts_for_itself():
    first = hrem(warmup_steps=2)
    first(**inputs())
    second = copy.deepcopy(first)
    second(**inputs())
    second(**inputs())
    assert (first.step.item(), second.step.item()) == (1, 3)
    assert first._counter.warming
    assert not second._counter.warming
    first.warmup_steps = 0
    assert not first._counter.warming
    with pytest.raises(ValueError, match="warmup_steps"):
        first.warmup_steps = -1


def test_six_products_of_embeddings_per_step():
    from torch.utils._python_dispatch import TorchDispatchMode

    n, seen = 32, []
    b = batch(n=n, dim=D, grad=False, dtype=torch.float32)

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and tuple(out.shape) == (n, n):
                seen.append(func)
            return out

    module = hrem(dtype=torch.float32)
    with Count(), torch.no_grad():
        module(**b)
    assert len(seen) == 6


# own parts


def test_a_pair_loss_per_term():
    b, seen = inputs(), []

    def named(name, value):
        def loss(similarity, positives):
            seen.append(name)
            return similarity.sum() * 0 + value

        return loss

    module = hrem(named("base", 1.0), enhanced_pair_loss=named("enhanced", 2.0), cross_pair_loss=named("cross", 3.0))
    terms = module.terms(**b)
    assert [x.item() for x in terms[1:5]] == [1.0, 2.0, 3.0, 3.0]
    assert sorted(seen) == ["base", "cross", "cross", "enhanced"]


def test_relate_gives_what_the_terms_are_made_of():
    module, b = hrem(warmup_steps=5), inputs()
    graph, v, u = module.relate(**b)
    expected = by_hand(module.eval(), b, module.pair_loss)
    positives = b["image_ids"].unsqueeze(1) == b["image_ids"]
    assert_near(module.pair_loss(v @ u.t(), positives), expected["enhanced"], 1e-12)
    assert_near(module.graph.regularization(graph, b["image_embedding"], b["text_embedding"]),
                expected["regularization"], 1e-12)  # fmt: skip
    assert module.step.item() == 0


def test_parts_that_return_the_wrong_thing_are_named():
    class Wrong(nn.Module):
        def __init__(self, result):
            super().__init__()
            self.result = result

        def forward(self, *_, **__):
            return self.result

    class WrongGraph(Wrong):
        def regularization(self, *_, **__):
            return torch.zeros(())

    b = inputs()
    for options, message in (
        ({"graph": WrongGraph(3)}, "graph must be a RelationGraph"),
        ({"graph": WrongGraph((1, 2))}, "graph must be a RelationGraph"),
        ({"interaction": Wrong(torch.zeros(2))}, "interaction must return"),
        ({"interaction": Wrong((torch.zeros(2, 2), torch.zeros(2, 2)))}, "what interaction returns as image_enhanced"),
        ({"interaction": Wrong((1, 2))}, "what interaction returns as image_enhanced"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            HREMLoss(D, **{"interaction": RelationInteraction(D, num_heads=2), **options}).double()(**b)


def test_an_interaction_may_compute_in_another_dtype_than_the_embeddings():
    class Wide(RelationInteraction):
        def forward(self, *args):
            image, text = super().forward(*args)
            return image.double(), text

    b = inputs(dtype=torch.float32)
    hardest = TripletLoss(negative_sampling="hardest")
    plain, wide = (
        HREMLoss(D, interaction=make(D, num_heads=2), pair_loss=hardest).eval() for make in (RelationInteraction, Wide)
    )
    wide.load_state_dict(plain.state_dict())
    assert_near(wide(**b), plain(**b), 1e-5)


def test_embed_dim_that_no_sixteen_heads_fit():
    with pytest.raises(ValueError, match=r"interaction=RelationInteraction\(300, num_heads=15\)"):
        HREMLoss(300)
    with pytest.raises(ValueError, match="num_heads=15 would fit"):
        RelationInteraction(300)


def test_relation_parameters():
    module = hrem()
    relation = set(module.relation_parameters())
    assert relation == {*module.graph.parameters(), *module.interaction.parameters()}


# dtypes


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, DOUBLE])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, DOUBLE])
def test_any_dtype_of_encoder_with_any_dtype_of_module(weights, dtype):
    module = hrem(dtype=weights)
    b = inputs(dtype=dtype)
    total = module(**b)
    assert total.dtype == (DOUBLE if dtype == DOUBLE else torch.float32)
    total.backward()
    assert all(torch.isfinite(x.grad).all() for x in b.values() if x.grad is not None)
    mixed = {**inputs(dtype=torch.float32), "text_embedding": b["text_embedding"]}
    assert torch.isfinite(module(**mixed))


@pytest.mark.parametrize("scale", [1e-20, 1e19])
def test_very_long_and_very_short_vectors_train(scale):
    module, b = hrem(dtype=torch.float32), inputs(dtype=torch.float32)
    scaled = {name: (x.detach() * scale).requires_grad_() if x.dtype.is_floating_point else x for name, x in b.items()}
    assert_near(module(**scaled), module(**b), 1e-4)
    module(**scaled).backward()
    assert scaled["image_embedding"].grad.any()
    assert torch.isfinite(scaled["image_embedding"].grad).all()


# N images with M texts, own positives


@pytest.mark.parametrize("mechanism", ["fusion", "standalone"])
@pytest.mark.parametrize("pair_loss", PAIR_LOSSES)
@pytest.mark.parametrize("graph", [{}, {"candidates": 3}, {"exclude_positives": True}])
def test_several_texts_per_image(mechanism, pair_loss, graph):
    index = torch.tensor([2, 0, 1, 1, 0])
    b = inputs(n=5)
    once = {name: x[:3] if name.startswith("image") else x for name, x in b.items() if name != "image_ids"}
    module = hrem(pair_loss, mechanism=mechanism, graph=graph)
    terms = module.terms(**once, image_index=index)
    positives = torch.arange(3).unsqueeze(1) == index
    similarity = normalize(once["image_embedding"], dim=1) @ normalize(once["text_embedding"], dim=1).t()
    assert_near(terms.base, module.pair_loss(similarity, positives), 1e-12)
    assert torch.equal(module(**once, positives=positives, image_index=index), terms.total)
    order = torch.tensor([4, 2, 0, 3, 1])  # the texts in another order
    moved = {name: x[order] if name.startswith("text") else x for name, x in once.items()}
    assert_near(module(**moved, image_index=index[order]), terms.total, 1e-11)
    identity = module(**inputs(), image_index=torch.arange(6))
    assert torch.equal(identity, module(**inputs()))
    ids = torch.tensor([5, 7, 5])  # images 0 and 2 show the same
    assert not torch.equal(module(**once, image_index=index, image_ids=ids), terms.total)


def test_positives_of_the_callers_own():
    seen = []

    def pair_loss(similarity, positives):
        seen.append(positives)
        return similarity.sum()

    b = {name: x for name, x in inputs(n=4).items() if name != "image_ids"}
    positives = torch.rand(4, 4) < 0.5
    hrem(pair_loss)(**b, positives=positives)
    assert all(torch.equal(x, positives) for x in seen)
    with pytest.raises(ValueError, match="positives and image_ids"):
        hrem()(**inputs(n=4), positives=positives)
    with pytest.raises(TypeError, match="positives"):
        hrem()(**b, image_ids=positives)
    for bad in (positives.float(), positives[:3], "all", positives.tolist()):
        with pytest.raises((TypeError, ValueError), match="positives"):
            hrem()(**b, positives=bad)


@pytest.mark.parametrize(("r", "w"), [(1, 1), (1, 3), (3, 1)])
@pytest.mark.parametrize("mode", ["scan", "cosine"])
def test_order_of_a_batch_with_single_fragments_and_twins(r, w, mode):
    b = {name: x.detach().clone() for name, x in inputs(n=7, r=r, w=w, dtype=torch.float32).items()}
    for x in b.values():
        x[5:] = x[:2]
    module = hrem(graph={"alignment": mode}, dtype=torch.float32)
    expected = module(**b)
    for seed in range(6):
        order = torch.randperm(7, generator=torch.Generator().manual_seed(seed))
        assert_near(module(**{name: x[order] for name, x in b.items()}), expected, 1e-4)
