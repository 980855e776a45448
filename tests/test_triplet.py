"""TripletLoss: every choice of negatives against loops over triplets, and the distribution of the draws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator

from hrem_layers import TripletLoss
from hrem_layers.losses import distance_log_weights, negatives
from hrem_layers.losses.negatives import draw

DOUBLE = torch.float64
NEGATIVES = ("distance_weighted", "hardest", "all", "expected")
OPTIONS = {"cutoff": 0.5, "nonzero_cutoff": 1.5, "weight_dim": 8}


def case(n, m, seed, density=0.3):
    """Cosines over the whole range, and any pattern of positives, rows without one and full rows included."""
    g = generator(seed)
    s = 2 * torch.rand(n, m, generator=g, dtype=DOUBLE) - 1
    return s.requires_grad_(), torch.rand(n, m, generator=g) < density


def log_weight(s, cutoff, nonzero_cutoff, weight_dim):
    """Wu et al., ICCV 2017, equation 5, for one pair; None: never drawn."""
    d = max(math.sqrt(max(0.0, 2 - 2 * s)), cutoff)
    if d >= nonzero_cutoff:
        return None
    return (2 - weight_dim) * math.log(d) - (weight_dim - 3) / 2 * math.log(1 - d * d / 4)


def row_weights(row, positive, options):
    """Probability of each item of the row as the negative of its anchor; all 0 without a candidate."""
    logs = [None if p else log_weight(s, **options) for s, p in zip(row.tolist(), positive.tolist(), strict=True)]
    most = max((x for x in logs if x is not None), default=0.0)
    weights = [0.0 if x is None else math.exp(x - most) for x in logs]
    return [w / sum(weights) if sum(weights) else 0.0 for w in weights]


def by_loop(s, positives, margin, choice, options=OPTIONS):
    total = s.new_zeros(())
    for similarity, positive in ((s, positives), (s.t(), positives.t())):
        for row, is_positive in zip(similarity, positive, strict=True):
            negatives = [k for k in range(len(row)) if not is_positive[k]]
            weights = row_weights(row.detach(), is_positive, options)
            for p in range(len(row)):
                if not is_positive[p] or not negatives:
                    continue
                hinges = [(margin - row[p] + row[k]).clamp(min=0) for k in negatives]
                if choice == "all":
                    total = total + sum(hinges)
                elif choice == "hardest":
                    total = total + max(hinges)
                else:
                    total = total + sum(weights[k] * h for k, h in zip(negatives, hinges, strict=True))
    return total


def agree(loss, expected, s):
    assert loss.shape == ()
    assert torch.isfinite(loss)
    assert abs(loss.item() - expected.item()) <= 1e-10 * max(1.0, expected.item())
    (ours,) = torch.autograd.grad(loss, s)
    theirs = torch.autograd.grad(expected, s)[0] if expected.requires_grad else torch.zeros_like(s)
    assert (ours - theirs).abs().max() <= 1e-10 * max(1.0, theirs.abs().max().item())


@pytest.mark.parametrize("choice", ["hardest", "all", "expected"])
@settings(max_examples=50)
@given(
    n=st.integers(1, 5), m=st.integers(1, 6), seed=st.integers(0, 2**31), margin=st.sampled_from([0.0, 0.2, 1.0, 3.0]),
    density=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
)  # fmt: skip
def test_loss_is_that_of_the_loop_over_triplets(choice, n, m, seed, margin, density):
    s, positives = case(n, m, seed, density)
    loss = TripletLoss(margin, negative_sampling=choice, **OPTIONS)
    agree(loss(s, positives), by_loop(s, positives, margin, choice), s)


@pytest.mark.parametrize("weight_dim", [2, 3, 8, 512])
@pytest.mark.parametrize(("cutoff", "nonzero_cutoff"), [(0.5, 1.7), (0.5, 1.9), (0.1, 2.0), (1.2, 1.3)])
def test_distance_weights(weight_dim, cutoff, nonzero_cutoff):
    options = {"cutoff": cutoff, "nonzero_cutoff": nonzero_cutoff, "weight_dim": weight_dim}
    s, positives = case(12, 15, weight_dim)
    log_w = distance_log_weights(s, positives, **options)
    assert not log_w.requires_grad
    for ours, row, positive in zip(log_w, s.tolist(), positives.tolist(), strict=True):
        for value, similarity, is_positive in zip(ours.tolist(), row, positive, strict=True):
            expected = None if is_positive else log_weight(similarity, **options)
            assert value == (-math.inf if expected is None else pytest.approx(expected, rel=1e-10, abs=1e-10))


def test_weight_is_zero_from_nonzero_cutoff_on_and_flat_below_cutoff():
    s = torch.tensor(
        [[1.0, 0.9, 0.876, -0.4449, -0.4451, -1.0]], dtype=DOUBLE
    )  # d = 0, .447, .498, 1.69994, 1.70006, 2
    none = torch.zeros_like(s, dtype=torch.bool)
    log_w = distance_log_weights(s, none, cutoff=0.5, nonzero_cutoff=1.7, weight_dim=512)[0]
    assert log_w[0] == log_w[1] == log_w[2]
    assert torch.isfinite(log_w[3])
    assert (log_w[4:] == -math.inf).all()
    # with nonzero_cutoff = 2 even opposite points have a finite weight below d = 2
    assert torch.isfinite(distance_log_weights(s, none, cutoff=0.5, nonzero_cutoff=2.0, weight_dim=512)[0, :5]).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_draws_follow_the_weights(transposed):
    # one anchor, so that loss = margin − s⁺ + s⁻ shows which negative was drawn
    s = torch.tensor([[0.9, 0.3, 0.1, -0.05, -0.2, -0.35, 0.5]], dtype=DOUBLE)
    positives = torch.zeros_like(s, dtype=torch.bool)
    positives[0, 0] = True
    options = {"cutoff": 0.5, "nonzero_cutoff": 1.6, "weight_dim": 5}
    expected = row_weights(s[0], positives[0], options)
    assert expected[5] == 0  # d = 1.64
    assert min(w for w in expected if w) > 0.02
    loss = TripletLoss(3.0, negative_sampling="distance_weighted", **options)
    draws = 3000
    count = dict.fromkeys(range(7), 0)
    values = (3.0 - 0.9 + s[0]).tolist()
    if transposed:
        s, positives = s.t(), positives.t()
    for _ in range(draws):
        value = loss(s, positives).item()
        count[min(range(7), key=lambda k: abs(values[k] - value))] += 1
    assert count[0] == count[5] == 0
    chi_square = sum((count[k] - draws * w) ** 2 / (draws * w) for k, w in enumerate(expected) if w)
    assert chi_square < 20.5  # 4 degrees of freedom: p = 4e-4


def test_draws_of_many_rows_follow_the_weights_and_are_independent():
    log_w = torch.tensor([0.0, math.log(3.0), -math.inf, math.log(6.0)], dtype=DOUBLE).expand(40000, 4)
    s = torch.arange(4.0, dtype=DOUBLE).expand(40000, 4)
    drawn, found = draw(log_w, torch.rand(40000, 1, dtype=DOUBLE, generator=generator(0)))
    negative = s.gather(1, drawn)
    assert found.all()
    share = torch.bincount(negative.flatten().long(), minlength=4) / 40000
    assert share.tolist() == pytest.approx([0.1, 0.3, 0.0, 0.6], abs=0.01)  # 4 standard deviations
    heaviest = (negative == 3).flatten().double()
    assert torch.corrcoef(torch.stack([heaviest[:-1], heaviest[1:]]))[0, 1].abs() < 0.02


def test_sampling_repeats_under_manual_seed_and_differs_without():
    s, positives = case(20, 20, 1)
    loss = TripletLoss(1.0, **OPTIONS)
    values = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        values.append(loss(s, positives).item())
    assert values[0] == values[1] != values[2]
    assert loss(s, positives).item() != loss(s, positives).item()


@pytest.mark.parametrize("shape", [(6, 8), (8, 8)])
def test_noise_decides_the_draw(shape):
    s, positives = case(*shape, 3)
    loss = TripletLoss(1.0, **OPTIONS)
    torch.manual_seed(9)
    noise = loss.draw_noise(s)
    assert noise.shape == (sum(shape),)
    assert noise.dtype == DOUBLE
    given = loss(s, positives, noise=noise)
    torch.manual_seed(9)
    assert torch.equal(loss(s, positives), given)
    assert torch.equal(loss(s, positives, noise=noise), given)
    # each direction has its own part: the transposed problem needs the parts exchanged
    swapped = torch.cat([noise[shape[0] :], noise[: shape[0]]])
    assert_near(loss(s.t(), positives.t(), noise=swapped), given, 1e-12)
    for choice in ("hardest", "all", "expected"):
        assert TripletLoss(negative_sampling=choice).draw_noise(s) is None


@pytest.mark.parametrize("seed", range(3))
def test_expected_is_the_mean_of_the_sampled(seed):
    s, positives = case(7, 9, seed)
    s = s.detach()
    sampled, expected = (TripletLoss(0.5, negative_sampling=c, **OPTIONS) for c in ("distance_weighted", "expected"))
    values = torch.stack([sampled(s, positives) for _ in range(1500)])
    standard_error = values.std().item() / 1500**0.5
    assert standard_error > 0
    assert abs(values.mean().item() - expected(s, positives).item()) < 4 * standard_error


@pytest.mark.parametrize("choice", ["distance_weighted", "expected"])
def test_an_anchor_without_a_candidate_counts_0_and_leaves_the_others_alone(choice):
    g = generator(0)
    s = (0.4 * torch.rand(5, 5, generator=g, dtype=DOUBLE)).requires_grad_()  # d about 1.3: all are candidates
    noise = torch.rand(2, 6, generator=g, dtype=DOUBLE)
    loss = TripletLoss(1.0, negative_sampling=choice, **OPTIONS)

    def value(similarity):
        n = len(similarity)
        drawn = noise[:, :n].flatten() if choice == "distance_weighted" else None
        return loss(similarity, torch.eye(n, dtype=torch.bool), noise=drawn)

    # image 5 and text 5 belong together and are at d = 1.9 from all others
    wide = torch.full((6, 6), -0.8, dtype=DOUBLE)
    wide[:5, :5] = s.detach()
    wide[5, 5] = 0.9
    wide.requires_grad_()
    assert value(s) > 0
    assert_near(value(wide), value(s), 1e-12)
    (grad,), (expected,) = torch.autograd.grad(value(wide), wide), torch.autograd.grad(value(s), s)
    assert_near(grad[:5, :5], expected, 1e-12)
    assert not grad[5].any()
    assert not grad[:, 5].any()


@pytest.mark.parametrize("choice", NEGATIVES)
@pytest.mark.parametrize("fill", [True, False])
def test_no_positive_or_no_negative_at_all_is_0_with_zero_gradient(choice, fill):
    s, _ = case(4, 3, 0)
    value = TripletLoss(negative_sampling=choice)(s, torch.full((4, 3), fill))
    value.backward()
    assert value.item() == 0
    assert not s.grad.any()


@pytest.mark.parametrize("choice", NEGATIVES)
def test_batch_of_one(choice):
    s = torch.tensor([[0.7]], requires_grad=True)
    value = TripletLoss(negative_sampling=choice)(s, torch.tensor([[True]]))
    value.backward()
    assert value.item() == 0
    assert s.grad.item() == 0


@pytest.mark.parametrize("choice", NEGATIVES)
@pytest.mark.parametrize("over", [1.0, 1.0 + 1.2e-7, 1.0 + 1e-5])
def test_similarities_rounded_over_1_stay_finite(choice, over):
    s = torch.tensor([[over, over, 0.2], [over, over, -over], [0.1, -over, over]], requires_grad=True)
    value = TripletLoss(negative_sampling=choice, nonzero_cutoff=2.0)(s, torch.eye(3, dtype=torch.bool))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(s.grad).all()


@pytest.mark.parametrize("choice", NEGATIVES)
def test_all_negative_similarities(choice):
    s, positives = case(5, 5, 2)
    s = (s.detach().abs() * -0.1 - 0.01).requires_grad_()
    noise = torch.rand(10, dtype=DOUBLE) if choice == "distance_weighted" else None
    value = TripletLoss(0.0, negative_sampling=choice, **OPTIONS)(s, positives, noise=noise)
    assert value > 0
    if noise is None:
        assert_near(value, by_loop(s, positives, 0.0, choice), 1e-12)


def test_ties_among_the_hardest_negatives():
    s = torch.tensor([[0.5, 0.4, 0.4]], dtype=DOUBLE, requires_grad=True)
    value = TripletLoss(0.2, negative_sampling="hardest")(s, torch.tensor([[True, False, False]]))
    value.backward()
    assert value.item() == pytest.approx(0.1)
    assert s.grad[0].sum().item() == pytest.approx(0)
    assert s.grad[0, 0].item() == -1


@pytest.mark.parametrize("choice", NEGATIVES)
def test_mean_divides_by_the_number_of_positive_pairs(choice):
    s, positives = case(6, 7, 4)
    noise = torch.rand(13, dtype=DOUBLE) if choice == "distance_weighted" else None
    total, mean = (
        TripletLoss(negative_sampling=choice, reduction=r, **OPTIONS)(s, positives, noise=noise)
        for r in ("sum", "mean")
    )
    assert_near(mean * positives.sum(), total, 1e-12)


@pytest.mark.parametrize("choice", NEGATIVES)
@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_gradcheck(choice, shape, monkeypatch):
    s, positives = case(*shape, 5)
    noise = torch.rand(sum(shape), dtype=DOUBLE) if choice == "distance_weighted" else None
    loss = TripletLoss(0.3, negative_sampling=choice, **OPTIONS)
    if choice in ("expected", "distance_weighted"):
        # the weights are no function to differentiate: hold them while s moves
        log_w = [distance_log_weights(x, p, **OPTIONS) for x, p in ((s, positives), (s.t(), positives.t()))]
        monkeypatch.setattr(negatives, "log_weights", lambda x, p, *_: log_w[0 if x.shape == shape else 1])
    assert torch.autograd.gradcheck(lambda x: loss(x, positives, noise=noise), s)


@pytest.mark.parametrize("choice", ["hardest", "all", "expected"])
def test_order_of_the_batch(choice):
    s, positives = case(5, 7, 6)
    rows, columns = torch.randperm(5), torch.randperm(7)
    loss = TripletLoss(negative_sampling=choice, **OPTIONS)
    assert_near(loss(s[rows][:, columns], positives[rows][:, columns]), loss(s, positives), 1e-12)
    assert_near(loss(s.t(), positives.t()), loss(s, positives), 1e-12)


def test_more_negatives_than_fit_as_triplets():
    # N·M·M triplets would be 12 GB here
    g = generator(0)
    s = torch.rand(1500, 1500, generator=g)
    positives = torch.rand(1500, 1500, generator=g) < 0.5
    value = TripletLoss(0.2, negative_sampling="all", reduction="mean")(s, positives)
    # s uniform on [0, 1]: E[0.2 − s + s′]₊ = ∫ (0.2 + x)₊ (1 − |x|) dx = 0.28667; 750 negatives, two directions
    x = torch.linspace(-0.2, 1, 10001, dtype=DOUBLE)
    mean_hinge = torch.trapezoid((0.2 + x) * (1 - x.abs()), x).item()
    assert value.item() == pytest.approx(2 * 750 * mean_hinge, rel=0.01)


@pytest.mark.parametrize("choice", NEGATIVES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_computed_in_float32(choice, dtype):
    s, positives = case(6, 6, 7)
    half = s.detach().to(dtype).requires_grad_()
    noise = torch.rand(12) if choice == "distance_weighted" else None
    loss = TripletLoss(negative_sampling=choice)
    value = loss(half, positives, noise=noise)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(half.float(), positives, noise=noise))
    value.backward()
    assert half.grad.dtype == dtype
    assert torch.isfinite(half.grad).all()


def test_defaults():
    loss = TripletLoss()
    assert (loss.margin, loss.negative_sampling, loss.cutoff) == (0.2, "distance_weighted", 0.5)
    assert (loss.nonzero_cutoff, loss.weight_dim, loss.reduction) == (1.7, 512, "sum")
