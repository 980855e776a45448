"""What holds for every pair loss: non-finite input, several captions per image, rows in chunks, dtypes, tracing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import assert_near, generator
from torch import nn

import hrem_layers.losses
from hrem_layers import InfoNCELoss, SigmoidLoss, TripletLoss
from hrem_layers.losses import _rows, hardest_negative, infonce

DOUBLE = torch.float64
NEGATIVES = ("distance_weighted", "hardest", "all", "expected")
TRIPLETS = {
    **{name: (lambda reduction, name=name: TripletLoss(negative_sampling=name, weight_dim=8, reduction=reduction))
       for name in NEGATIVES},
    "callable": lambda reduction: TripletLoss(negative_sampling=hardest_negative, reduction=reduction),
}  # fmt: skip
LOSSES = {
    **TRIPLETS,
    "infonce": lambda reduction: InfoNCELoss(0.3, reduction=reduction),
    "infonce learnable": lambda reduction: InfoNCELoss(0.3, learnable=True, reduction=reduction),
    "sigmoid": lambda reduction: SigmoidLoss(0.3, bias=-1.0, reduction=reduction),
    "sigmoid fixed": lambda reduction: SigmoidLoss(0.3, bias=-1.0, learnable=False, reduction=reduction),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
either_reduction = pytest.mark.parametrize("reduction", ["sum", "mean"])


def case(n, m, seed=0, density=0.3, dtype=DOUBLE):
    g = generator(seed)
    s = (2 * torch.rand(n, m, generator=g, dtype=DOUBLE) - 1).to(dtype).requires_grad_()
    return s, torch.rand(n, m, generator=g) < density


def run(loss, s, positives, seed=0):
    torch.manual_seed(seed)
    return loss(s, positives)


# non-finite in, non-finite out


def places():
    """4 images, 6 texts. Image 3 has no positive, text 5 none, image 2 no negative; text 4 is out of reach."""
    positives = torch.zeros(4, 6, dtype=torch.bool)
    positives[0, 0] = positives[0, 1] = positives[1, 2] = True
    positives[2] = True
    positives[2, 5] = False
    s = torch.full((4, 6), 0.1)
    s[positives] = 0.2
    s[:, 4] = -0.9
    s[2, 5] = -1.0
    return s, positives


PLACES = {
    "a positive": (0, 0), "one of two positives": (0, 1), "a negative": (0, 3), "an anchor without positive": (3, 3),
    "a text without positive": (1, 5), "a negative out of reach": (1, 4), "an anchor of positives": (2, 3),
    "no candidate": (2, 5),
}  # fmt: skip


@every_loss
@either_reduction
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_one_bad_similarity_makes_the_loss_nan(name, reduction, bad, place):
    s, positives = places()
    assert torch.isfinite(run(LOSSES[name](reduction), s, positives))
    s[PLACES[place]] = bad
    s.requires_grad_()
    loss = run(LOSSES[name](reduction), s, positives)
    assert torch.isnan(loss)
    loss.backward()
    assert not torch.isfinite(s.grad).all()


@every_loss
@either_reduction
@pytest.mark.parametrize("fill", [True, False])
def test_nan_everywhere_is_nan_whatever_the_positives(name, reduction, fill):
    s = torch.full((4, 4), math.nan)
    for positives in (torch.eye(4, dtype=torch.bool), torch.full((4, 4), fill)):
        assert torch.isnan(LOSSES[name](reduction)(s, positives))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(10))
def test_bad_noise_makes_the_loss_nan(bad, place):
    s, positives = places()
    loss = TripletLoss()
    noise = loss.draw_noise(s)
    noise[place] = bad
    assert torch.isnan(loss(s, positives, noise=noise))


@pytest.mark.parametrize("name", ["infonce learnable", "sigmoid"])
def test_a_bad_parameter_makes_the_loss_nan(name):
    loss = LOSSES[name]("mean")
    with torch.no_grad():
        loss.log_scale.fill_(math.nan)
    assert torch.isnan(loss(*places()))


def test_a_bad_negative_of_ones_own_makes_the_loss_nan():
    s, positives = places()

    def broken(similarity, flags):
        negative, found = hardest_negative(similarity, flags)
        return torch.where(torch.arange(len(negative)).unsqueeze(1) == 3, math.nan, negative), found

    assert torch.isnan(TripletLoss(negative_sampling=broken)(s, positives))


@every_loss
def test_large_finite_similarities_stay_finite(name):
    s, positives = case(5, 6, dtype=torch.float32)
    assert torch.isfinite(run(LOSSES[name]("sum"), s.detach() * 1e4, positives))


# N images with M texts


def five_captions(n=4, seed=0):
    s, _ = case(n, 5 * n, seed)
    ids = torch.arange(n).repeat_interleave(5)
    ids[0] = 1  # one image has six captions, another four
    return s, torch.arange(n).unsqueeze(1) == ids


def choose_by_loop(row, flags, name, u, options):
    """Index of the row's negative and its weight: [(k, weight)]."""
    negatives = [k for k in range(len(row)) if not flags[k]]
    if name in ("hardest", "callable"):
        return [(max(negatives, key=lambda k: row[k]), 1.0)] if negatives else []
    if name == "all":
        return [(k, 1.0) for k in negatives]
    distance = {k: max(math.sqrt(2 - 2 * row[k]), options["cutoff"]) for k in negatives}
    n = options["weight_dim"]
    near = {k: d for k, d in distance.items() if d < options["nonzero_cutoff"]}
    weight = {k: d ** (2 - n) * (1 - d * d / 4) ** (-(n - 3) / 2) for k, d in near.items()}
    total = sum(weight.values())
    if name == "expected":
        return [(k, w / total) for k, w in weight.items()]
    reached = 0.0
    for k, w in weight.items():
        reached += w
        if reached > u * total:
            return [(k, 1.0)]
    return []


@pytest.mark.parametrize("name", TRIPLETS)
@either_reduction
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pairs", ["five captions", "any"])
def test_several_positives_are_the_loop(name, reduction, seed, pairs):
    s, positives = five_captions(seed=seed) if pairs == "five captions" else case(5, 9, seed, density=0.4)
    options = {"cutoff": 0.4, "nonzero_cutoff": 1.6, "weight_dim": 7}
    loss = TripletLoss(0.3, negative_sampling=hardest_negative if name == "callable" else name, reduction=reduction,
                       **options)  # fmt: skip
    noise = loss.draw_noise(s)
    actual = loss(s, positives, noise=noise)
    expected, anchor = s.new_zeros(()), 0
    for matrix, all_flags in ((s, positives), (s.t(), positives.t())):
        for row, flags in zip(matrix, all_flags, strict=True):
            u = 0.0 if noise is None else noise[anchor].item()
            anchor += 1
            for k, weight in choose_by_loop(row.tolist(), flags.tolist(), name, u, options):
                for p in range(len(row)):
                    if flags[p]:
                        expected = expected + weight * (0.3 - row[p] + row[k]).clamp(min=0)
    if reduction == "mean":
        expected = expected / positives.sum()
    assert anchor == sum(s.shape)
    assert_near(actual, expected, 1e-12)
    assert_near(torch.autograd.grad(actual, s)[0], torch.autograd.grad(expected, s)[0], 1e-12)


@either_reduction
def test_infonce_of_several_captions_is_the_loop(reduction):
    s, positives = five_captions()
    positives[3] = False  # an image and five texts without a positive: they count in no mean
    directions = []
    for matrix, all_flags in ((s, positives), (s.t(), positives.t())):
        anchors = [
            -torch.stack([(row / 0.2).log_softmax(0)[p] for p in range(len(row)) if flags[p]]).mean()
            for row, flags in zip(matrix, all_flags, strict=True) if flags.any()
        ]  # fmt: skip
        assert len(anchors) < len(matrix)
        directions.append(torch.stack(anchors).sum() / (len(anchors) if reduction == "mean" else 1))
    expected = sum(directions) / 2
    actual = InfoNCELoss(0.2, reduction=reduction)(s, positives)
    assert_near(actual, expected, 1e-12)
    assert_near(torch.autograd.grad(actual, s)[0], torch.autograd.grad(expected, s)[0], 1e-12)


# a large matrix in chunks of rows


@pytest.fixture(params=[1, 11, 40])
def small_chunks(request, monkeypatch):
    """Chunks of one row and of a few, the last one smaller."""
    monkeypatch.setattr(_rows, "CHUNK_ELEMENTS", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def whole(function, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_rows, "CHUNK_ELEMENTS", 2**40)
        return function(*arguments)


@every_loss
@either_reduction
@pytest.mark.parametrize("shape", [(7, 9), (4, 20), (13, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_chunks_are_the_whole(name, reduction, shape, transposed, small_chunks):
    s, positives = case(*shape, seed=2)
    loss = LOSSES[name](reduction).double()
    leaves = [s, *loss.parameters()]
    x, flags = (s.t(), positives.t()) if transposed else (s, positives)
    expected = whole(run, loss, x, flags)
    actual = run(loss, x, flags)
    assert_near(actual, expected, 1e-12)
    # a factor: the gradient that came from above
    for ours, theirs in zip(
        torch.autograd.grad(3 * actual, leaves), torch.autograd.grad(3 * expected, leaves), strict=True
    ):
        assert_near(ours, theirs, 1e-12)
    with torch.no_grad():
        assert_near(run(loss, x, flags), expected, 1e-12)
    assert_near(run(loss, x.detach(), flags), expected, 1e-12)


@pytest.mark.parametrize("name", ["infonce learnable", "sigmoid", "hardest"])
def test_second_derivatives_of_chunks_are_those_of_the_whole(name, small_chunks):
    s, positives = case(6, 8, seed=3)
    loss = LOSSES[name]("sum").double()
    leaves = [s, *loss.parameters()]

    def second():
        grads = torch.autograd.grad(loss(s, positives), leaves, create_graph=True)
        norm = sum((g**2).sum() for g in grads)
        return torch.autograd.grad(norm + 0 * s.sum(), leaves, allow_unused=True)

    for ours, theirs in zip(second(), whole(second), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert (ours - theirs).abs().max() <= 1e-11 * max(1, theirs.abs().max())


@pytest.mark.parametrize("name", ["infonce learnable", "hardest"])
def test_chunks_twice_backward_and_under_torch_func(name, small_chunks):
    s, positives = case(6, 8, seed=4)
    loss = LOSSES[name]("mean").double().eval()  # in training a learnable temperature is first held in range
    value = loss(s, positives)
    first = torch.autograd.grad(value, s, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, s)[0])
    assert_near(torch.func.grad(lambda x: loss(x, positives))(s.detach()), first, 1e-12)


def test_a_large_matrix_is_cut_and_a_small_one_is_not(monkeypatch):
    calls = []

    def spy(function):
        def call(*arguments, **options):
            calls.append(function.__name__)
            return function(*arguments, **options)

        return call

    for name in ("_whole", "in_chunks"):
        monkeypatch.setattr(_rows, name, spy(getattr(_rows, name)))
    monkeypatch.setattr(infonce._RowLoss, "both_ways", spy(infonce._RowLoss.both_ways))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for n in (16, 600):
        for loss in (SigmoidLoss(), InfoNCELoss()):
            loss(torch.zeros(n, n), torch.eye(n, dtype=torch.bool))
    assert calls == ["_whole", "both_ways", "in_chunks", "in_chunks"]


# dtypes and what is refused


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_similarities_are_computed_in_float32(name, dtype):
    s, positives = case(5, 7, dtype=dtype)
    loss = LOSSES[name]("mean")
    value = run(loss, s, positives)
    assert value.dtype == torch.float32
    assert torch.equal(value, run(loss, s.detach().float(), positives))
    value.backward()
    assert s.grad.dtype == dtype


NO_PAIRS = torch.zeros(0, 4, dtype=torch.bool)


@every_loss
@pytest.mark.parametrize("change", [
    ({"similarity": torch.zeros(3, 4).long()}, TypeError, "similarity must be a floating-point tensor"),
    ({"similarity": torch.zeros(3, 4, dtype=torch.bool)}, TypeError, "similarity must be a floating-point tensor"),
    ({"similarity": torch.zeros(3, 4, dtype=torch.complex64)}, TypeError, "similarity must be a floating-point tensor"),
    ({"similarity": torch.zeros(3, 4).to_sparse()}, TypeError, "similarity must be a tensor in the dense"),
    ({"similarity": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, TypeError, "similarity must be float16, bfloat16"),
    ({"similarity": np.zeros((3, 4))}, TypeError, "similarity must be a tensor of shape .*, got ndarray"),
    ({"similarity": torch.zeros(3)}, ValueError, r"similarity must have shape \(N, M\), got shape \(3,\)"),
    ({"similarity": torch.zeros(0, 4), "positives": NO_PAIRS}, ValueError, "at least 1 pair"),
    ({"positives": torch.zeros(3, 4).long()}, TypeError, "positives must be a dense bool tensor.*int64"),
    ({"positives": torch.zeros(3, 4)}, TypeError, "positives must be a dense bool tensor.*float32"),
    ({"positives": np.zeros((3, 4), dtype=bool)}, TypeError, "positives must be a bool tensor.*got an array"),
    ({"positives": None}, TypeError, "positives must be a bool tensor.*got None"),
    ({"positives": torch.zeros(4, 3, dtype=torch.bool)}, ValueError, r"positives must have shape \(3, 4\)"),
    ({"positives": torch.zeros(3, 4, dtype=torch.bool).to_sparse()}, TypeError, "positives must be a dense bool"),
    ({"positives": torch.zeros(3, 4, dtype=torch.bool, device="meta")}, ValueError, "positives must be on cpu"),
])  # fmt: skip
def test_wrong_input_is_named(name, change):
    given, error, said = change
    right = {"similarity": torch.zeros(3, 4), "positives": torch.zeros(3, 4, dtype=torch.bool)}
    with pytest.raises(error, match=said):
        LOSSES[name]("sum")(**{**right, **given})


@pytest.mark.parametrize("function", ["triplet_loss", "info_nce_loss", "sigmoid_loss"])
def test_functions_check_as_modules_do(function):
    call = getattr(hrem_layers.losses, function)
    s, positives = case(3, 4)
    with pytest.raises(ValueError, match="reduction must be one of 'sum', 'mean', got 'none'"):
        call(s, positives, reduction="none")
    with pytest.raises(TypeError, match="positives must be a dense bool tensor"):
        call(s, positives.int())
    if function == "triplet_loss":
        with pytest.raises(ValueError, match="margin must be finite and at least 0"):
            call(s, positives, margin=math.nan)
        with pytest.raises(ValueError, match="nonzero_cutoff"):
            call(s, positives, cutoff=1.5, nonzero_cutoff=1.0)
    else:
        with pytest.raises(ValueError, match="scale must be finite and greater than 0, got 0"):
            call(s, positives, scale=0)
        with pytest.raises(ValueError, match=r"scale must have shape \(\)"):
            call(s, positives, scale=torch.ones(2))


def test_functions_and_modules_agree():
    s, positives = case(4, 6)
    functions = hrem_layers.losses
    for module, value in (
        (TripletLoss(0.3, negative_sampling="expected", weight_dim=9),
         functions.triplet_loss(s, positives, margin=0.3, negative_sampling="expected", weight_dim=9)),
        (InfoNCELoss(0.5), functions.info_nce_loss(s, positives, scale=2.0)),
        (InfoNCELoss(0.5), functions.info_nce_loss(s, positives, scale=torch.tensor(2.0))),
        (SigmoidLoss(0.5, bias=-2.0, learnable=False), functions.sigmoid_loss(s, positives, scale=2.0, bias=-2.0)),
    ):  # fmt: skip
        assert_near(module(s, positives), value, 1e-12)


def test_every_public_name_is_there_and_has_an_example():
    for name in hrem_layers.losses.__all__:
        assert ">>>" in getattr(hrem_layers.losses, name).__doc__, name


# traced


@every_loss
def test_traced_whole_it_is_the_same(name):
    torch._dynamo.reset()
    loss = LOSSES[name]("mean")
    compiled = torch.compile(loss, backend="eager", fullgraph=True, dynamic=True)
    for shape in ((5, 9), (8, 6)):
        s, positives = case(*shape, dtype=torch.float32)
        expected = run(loss, s, positives)
        actual = run(compiled, s, positives)
        assert_near(actual, expected, 1e-6)
        assert_near(torch.autograd.grad(actual, s)[0], torch.autograd.grad(expected, s)[0], 1e-5)
    torch._dynamo.reset()


@every_loss
def test_no_value_is_waited_for(name):
    """On meta tensors any look at a value would fail."""
    loss = LOSSES[name]("mean").to("meta")
    s = torch.zeros(400, 500, device="meta", requires_grad=True)
    value = loss(s, torch.zeros(400, 500, dtype=torch.bool, device="meta"))
    value.backward()
    assert value.shape == ()
    assert s.grad.shape == s.shape


# a model's own temperature


LIMIT = math.log(100)


class Clip(nn.Module):
    def __init__(self, log_scale=LIMIT, shape=()):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.full(shape, log_scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_temperature_at_clips_own_limit_is_taken(dtype):
    clip = Clip().to(dtype)
    for temperature in (1 / clip.logit_scale.exp(), (1 / clip.logit_scale.exp()).item()):
        loss = InfoNCELoss(temperature, learnable=True)
        assert loss.temperature == pytest.approx(0.01, rel=0.02)
        assert loss.temperature >= 0.01
        assert loss.log_scale.item() <= math.log(100) + 1e-6
        assert loss.log_scale.is_leaf
    assert InfoNCELoss(1 / clip.logit_scale.exp()).temperature == pytest.approx(0.01, rel=0.02)


@pytest.mark.parametrize("bad", [0.0098, 0.009, 0])
def test_a_temperature_beyond_the_limit_is_not(bad):
    with pytest.raises(ValueError, match=r"temperature must be finite and at least 0\.01"):
        InfoNCELoss(bad, learnable=True)


@pytest.mark.parametrize(
    ("bad", "error"),
    [(torch.ones(2), TypeError), (torch.ones(1, dtype=torch.complex64), TypeError), (torch.tensor(True), TypeError),
     (torch.tensor(math.nan), ValueError), (torch.tensor(-1.0), ValueError), (np.ones(2), TypeError)],
)  # fmt: skip
def test_a_tensor_that_is_no_temperature(bad, error):
    with pytest.raises(error, match="temperature must be"):
        InfoNCELoss(bad)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_models_parameter_is_shared(shape):
    clip = Clip(math.log(20), shape)
    loss = InfoNCELoss(log_scale=clip.logit_scale)
    assert loss.log_scale is clip.logit_scale
    # its owner trains it and saves it
    assert not list(loss.parameters())
    assert not loss.state_dict()
    s, positives = case(4, 6)
    value = loss(s, positives)
    assert_near(value, InfoNCELoss(1 / 20)(s, positives), 1e-6)
    value.backward()
    assert clip.logit_scale.grad.abs().item() > 0
    with torch.no_grad():
        clip.logit_scale.fill_(math.log(5))
    assert_near(loss(s, positives), InfoNCELoss(1 / 5)(s, positives), 1e-6)
    clip.load_state_dict({"logit_scale": torch.full(shape, math.log(10))})
    assert_near(loss(s, positives), InfoNCELoss(1 / 10)(s, positives), 1e-6)
    clip.double()  # in place, as Module.to does
    assert loss.log_scale is clip.logit_scale


def test_a_shared_parameter_is_not_set_back():
    clip = Clip(7.0)
    s, positives = case(4, 4)
    value = InfoNCELoss(log_scale=clip.logit_scale)(s, positives)
    assert clip.logit_scale.item() == 7.0
    assert_near(value, InfoNCELoss(math.exp(-7.0))(s, positives), 1e-5)


@pytest.mark.parametrize("options", [{"learnable": True}, {"temperature": 0.1}])
def test_a_shared_parameter_and_a_temperature_exclude_each_other(options):
    with pytest.raises(ValueError, match="log_scale must come without temperature and learnable"):
        InfoNCELoss(**options, log_scale=Clip().logit_scale)


@pytest.mark.parametrize(
    ("bad", "error"), [(2.0, TypeError), (torch.zeros(()), TypeError), (nn.Parameter(torch.zeros(2)), ValueError),
                       (nn.Parameter(torch.zeros(1, 1)), ValueError)],
)  # fmt: skip
def test_what_no_shared_parameter_is(bad, error):
    with pytest.raises(error, match="log_scale must"):
        InfoNCELoss(log_scale=bad)


def test_repr_of_a_shared_temperature_says_so():
    assert "log_scale=Parameter" in repr(InfoNCELoss(log_scale=Clip().logit_scale)).replace("\n", " ")
