"""Two passes over micro-batches: the gradients of one pass, whatever the encoders return and draw."""

from __future__ import annotations

import copy
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support import assert_near, generator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hrem_layers import AssociationGraph, HREMLoss, InfoNCELoss, RelationInteraction
from hrem_layers.tools.gradient_cache import gradient_cached_backward

Encoded = namedtuple("Encoded", "embedding fragments mask")
DIM = 8


class ImageEncoder(nn.Module):
    """Embedding, fragments and no mask."""

    def __init__(self, dropout=0.0, norm=False):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(5, 16), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout),
            nn.Linear(16, DIM),
        )  # fmt: skip
        self.calls = []

    def forward(self, x):
        self.calls.append((len(x), torch.is_grad_enabled()))
        fragments = self.layers(x)
        return Encoded(fragments.mean(dim=1), fragments, None)


class TextEncoder(nn.Module):
    """Embedding, fragments and mask in a dictionary, from two inputs."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.words, self.dropout = nn.Embedding(30, DIM), nn.Dropout(dropout)

    def forward(self, tokens, lengths):
        words = self.dropout(self.words(tokens))
        mask = torch.arange(tokens.shape[1]) < lengths.unsqueeze(1)
        return {"words": (words, mask), "embedding": words.mean(dim=1)}


def data(n=10, m=None, seed=0):
    g = generator(seed)
    m = n if m is None else m
    images = torch.randn(n, 4, 5, generator=g)
    return [(images,), (torch.randint(30, (m, 6), generator=g), torch.randint(1, 7, (m,), generator=g))]


def encoders(dropout=0.0, norm=False):
    torch.manual_seed(3)
    return [ImageEncoder(dropout, norm).double().train(), TextEncoder(dropout).double().train()]


def relation_loss():
    torch.manual_seed(4)
    graph = AssociationGraph(detach_fragments=False)
    return HREMLoss(DIM, graph=graph, interaction=RelationInteraction(DIM, num_heads=2, dropout=0.1, gate=0.6)).double()


def as_terms(loss):
    def call(image, text):
        assert isinstance(image, Encoded) and image.mask is None
        return loss(image.embedding, text["embedding"], image.fragments, text["words"][0], None, text["words"][1])

    return call


def doubled(inputs):
    return [tuple(x.double() if x.is_floating_point() else x for x in arguments) for arguments in inputs]


def one_pass(loss, both, inputs, size):
    """All activations in one graph. The same cut, for random numbers are drawn micro-batch by micro-batch."""
    outputs = []
    for encoder, arguments in zip(both, inputs, strict=True):
        parts = [encoder(*(x[i : i + size] for x in arguments)) for i in range(0, len(arguments[0]), size)]
        outputs.append(joined(parts))
    total = loss(*outputs)
    total.backward()
    return total.detach()


def joined(parts):
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, dict):
        return {key: joined([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple):
        values = [joined(list(column)) for column in zip(*parts, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else tuple(values)
    return torch.cat(parts)


def grads(*modules):
    return [p.grad for module in modules for p in module.parameters()]


def assert_same_grads(ours, theirs, tolerance=1e-12):
    found = grads(*ours)
    assert any(g is not None and g.abs().max() > 0 for g in found)
    for a, b in zip(found, grads(*theirs), strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert_near(a, b, tolerance)


@pytest.mark.parametrize("size", [1, 3, 5, 10, 64])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradients_are_those_of_one_pass(size, dropout):
    inputs = doubled(data())
    theirs, their_loss = encoders(dropout), relation_loss()
    torch.manual_seed(1)
    expected = one_pass(as_terms(their_loss), theirs, inputs, size)
    after = torch.rand(())
    ours, our_loss = encoders(dropout), relation_loss()
    torch.manual_seed(1)
    total = gradient_cached_backward(as_terms(our_loss), ours, inputs, micro_batch_size=size)
    assert torch.equal(torch.rand(()), after)
    assert not total.requires_grad
    assert_near(total, expected, 1e-12)
    assert_same_grads([*ours, our_loss], [*theirs, their_loss])
    assert our_loss.step == 1
    cut = [min(size, 10 - i) for i in range(0, 10, size)]
    assert ours[0].calls == [(k, False) for k in cut] + [(k, True) for k in cut]


def test_without_dropout_those_of_the_whole_batch():
    inputs = doubled(data())
    theirs, ours = encoders(), encoders()

    def loss(image, text):
        return InfoNCELoss(0.1)(image.embedding @ text["embedding"].t(), torch.eye(10, dtype=torch.bool))

    one_pass(loss, theirs, inputs, 10)
    gradient_cached_backward(loss, ours, inputs, micro_batch_size=3)
    assert_same_grads(ours, theirs)


@settings(max_examples=15)
@given(n=st.integers(1, 9), m=st.integers(1, 9), size=st.integers(1, 10), seed=st.integers(0, 99))
@example(n=1, m=1, size=1, seed=0)
@example(n=2, m=9, size=4, seed=0)
def test_any_sizes(n, m, size, seed):
    inputs = doubled(data(n, m, seed))
    theirs, ours = encoders(0.3), encoders(0.3)

    def loss(image, text):
        return (image.embedding @ text["embedding"].t()).square().sum() + text["words"][0].sum()

    torch.manual_seed(seed)
    expected = one_pass(loss, theirs, inputs, size)
    torch.manual_seed(seed)
    assert_near(gradient_cached_backward(loss, ours, inputs, micro_batch_size=size), expected, 1e-12)
    assert_same_grads(ours, theirs)


def test_gradients_add_to_those_that_are_there():
    inputs = doubled(data())
    ours = encoders()

    def loss(image, text):
        return image.embedding.square().sum() + text["embedding"].square().sum()

    gradient_cached_backward(loss, ours, inputs, micro_batch_size=4)
    once = [g.clone() for g in grads(*ours)]
    gradient_cached_backward(loss, ours, inputs, micro_batch_size=4)
    for a, b in zip(grads(*ours), once, strict=True):
        assert_near(a, 2 * b, 1e-12)


def test_fewer_activations_at_a_time():
    """What the graph keeps is at no time more than that of one micro-batch."""
    kept, most = 0, 0

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            nonlocal kept, most
            kept += len(x) * x.requires_grad
            most = max(most, kept)
            ctx.length = len(x)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            nonlocal kept
            kept -= ctx.length
            return grad

    linear = nn.Linear(5, 3)
    images = torch.randn(12, 5)
    gradient_cached_backward(
        lambda x: x.square().sum(), [lambda x: Kept.apply(linear(x)) if torch.is_grad_enabled() else linear(x)],
        [(images,)], micro_batch_size=3,
    )  # fmt: skip
    assert (kept, most) == (0, 3)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside):
    inputs = data()

    def encode(encoder):
        def call(*arguments):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=not outside):
                return encoder(*arguments)

        return call if not outside else encoder

    def loss(image, text):
        assert image.fragments.dtype == torch.bfloat16
        return (image.embedding.float() @ text["embedding"].t().float()).square().mean()

    theirs, ours = (list(map(nn.Module.float, encoders(0.3))) for _ in range(2))
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        total = gradient_cached_backward(loss, list(map(encode, ours)), inputs, micro_batch_size=4)
    torch.manual_seed(1)
    outputs = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for encoder, arguments in zip(theirs, inputs, strict=True):
            outputs.append(joined([encoder(*(x[i : i + 4] for x in arguments)) for i in (0, 4, 8)]))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=outside):
        expected = loss(*outputs)
    expected.backward()
    assert_near(total, expected.detach(), 1e-6)
    assert_same_grads(ours, theirs, 2e-2)  # sums over micro-batches are rounded to bfloat16 in one pass


def test_gradients_flow_outside_of_autocast():
    seen = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, what):
            ctx.what = what
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append((ctx.what, torch.is_autocast_enabled("cpu")))
            return grad, None

    x = torch.randn(4, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gradient_cached_backward(
            lambda y: Look.apply(y.sum(), "loss"), [lambda x: Look.apply(x, "encoder")], [(x,)], micro_batch_size=2
        )
        assert torch.is_autocast_enabled("cpu")
    assert seen == [("loss", False), ("encoder", False), ("encoder", False)]


def test_a_loss_scale():
    inputs = doubled(data())

    def loss(image, text):
        return image.embedding.square().sum() + text["embedding"].square().sum()

    plain, scaled = encoders(), encoders()
    expected = gradient_cached_backward(loss, plain, inputs, micro_batch_size=4)
    total = gradient_cached_backward(
        loss, scaled, inputs, micro_batch_size=4, backward=lambda x: (x * 1024).backward()
    )  # fmt: skip
    assert_near(total, expected, 1e-12)
    for a, b in zip(grads(*scaled), grads(*plain), strict=True):
        assert_near(a, 1024 * b, 1e-12)


def test_frozen_and_unused():
    inputs = doubled(data())
    ours = encoders()
    ours[0].requires_grad_(False)
    gradient_cached_backward(
        lambda image, text: (image.embedding @ text["embedding"].t()).sum(), ours, inputs, micro_batch_size=4
    )
    assert all(g is None for g in grads(ours[0])) and all(g is not None for g in grads(ours[1]))
    ours = encoders()
    gradient_cached_backward(lambda image, text: image.embedding.sum(), ours, inputs, micro_batch_size=4)
    assert all(g is None for g in grads(ours[1]))
    assert [grad for _, grad in ours[0].calls] == [False] * 3 + [True] * 3
    ours = encoders()
    total = gradient_cached_backward(lambda image, text: torch.tensor(1.0), ours, inputs, micro_batch_size=4)
    assert total == 1 and all(g is None for g in grads(*ours))


def test_running_statistics_are_counted_once():
    inputs = doubled(data())
    ours, theirs = encoders(norm=True), encoders(norm=True)

    def loss(image, text):
        return (image.embedding @ text["embedding"].t()).square().sum()

    one_pass(loss, theirs, inputs, 5)
    gradient_cached_backward(loss, ours, inputs, micro_batch_size=5)
    assert_same_grads(ours, theirs)
    for (name, a), (_, b) in zip(ours[0].named_buffers(), theirs[0].named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_lists_are_cut_as_well():
    words = nn.Embedding(5, 3)
    texts = ["a", "bb", "ccc", "dd", "e"]
    gradient_cached_backward(
        lambda x: x.square().sum(), [lambda batch: words(torch.tensor([len(t) for t in batch]))], [(texts,)],
        micro_batch_size=2,
    )  # fmt: skip
    expected = torch.zeros(5, 3)
    for t in texts:
        expected[len(t)] += 2 * words.weight.detach()[len(t)]
    assert_near(words.weight.grad, expected, 1e-6)


def test_data_that_are_trained():
    x = torch.randn(5, 3, requires_grad=True)
    gradient_cached_backward(lambda y: y.square().sum(), [lambda x: x * 2], [(x,)], micro_batch_size=2)
    assert_near(x.grad, 8 * x.detach(), 1e-6)


def test_distributed_data_parallel_averages_once(tmp_path, monkeypatch):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        inputs = doubled(data())
        theirs = encoders(0.3)
        ours = [DistributedDataParallel(copy.deepcopy(encoder)) for encoder in theirs]
        reduced = []
        for i, encoder in enumerate(ours):
            encoder.register_comm_hook(i, lambda i, bucket: reduced.append(i) or _done(bucket))

        def loss(image, text):
            return (image.embedding @ text["embedding"].t()).square().sum()

        torch.manual_seed(1)
        one_pass(loss, theirs, inputs, 4)
        torch.manual_seed(1)
        gradient_cached_backward(loss, ours, inputs, micro_batch_size=4)
        assert_same_grads(ours, theirs)
        assert reduced == [0, 1]
        assert all(encoder.require_backward_grad_sync for encoder in ours)
    finally:
        dist.destroy_process_group()


def _done(bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


LINEAR = nn.Linear(5, 3)
RIGHT = {"loss": lambda x: x.sum(), "encoders": [LINEAR], "inputs": [(torch.ones(4, 5),)], "micro_batch_size": 2}


def uneven(x):
    return LINEAR(x) if len(x) == 3 else LINEAR(x)[:, :1]


@pytest.mark.parametrize("change", [
    ({"loss": 3}, TypeError, "loss must be a callable"),
    ({"loss": lambda x: x}, TypeError, "loss must return a scalar tensor"),
    ({"loss": lambda x: 1.0}, TypeError, "loss must return a scalar tensor, got 1.0"),
    ({"encoders": LINEAR}, TypeError, "encoders must be a list"),
    ({"encoders": [3]}, TypeError, r"encoders\[0\] must be callable"),
    ({"encoders": [LINEAR, LINEAR]}, ValueError, "inputs must have one entry per encoder, got 2 encoders, 1 inputs"),
    ({"encoders": [], "inputs": []}, ValueError, "inputs must have one entry per encoder"),
    ({"inputs": torch.ones(4, 5)}, TypeError, "inputs must be a list"),
    ({"inputs": [torch.ones(4, 5)]}, TypeError, r"inputs\[0\] must be a tuple of the encoder's arguments"),
    ({"inputs": [()]}, TypeError, r"inputs\[0\] must be a tuple"),
    ({"inputs": [(torch.ones(4, 5), 3)]}, TypeError, r"inputs\[0\] must hold tensors \(N, ...\) and lists of N, got 3"),
    ({"inputs": [(torch.ones(4, 5), [1] * 3)]}, ValueError, r"inputs\[0\] must be of one length, .* got \[3, 4\]"),
    ({"inputs": [(torch.ones(0, 5),)]}, ValueError, r"inputs\[0\] must be of one length, at least 1"),
    ({"inputs": [(LINEAR.weight.t() * 2,)]}, ValueError, r"inputs\[0\] must be data"),
    ({"micro_batch_size": 0}, ValueError, "micro_batch_size must be at least 1"),
    ({"micro_batch_size": 1.5}, TypeError, "micro_batch_size must be an int"),
    ({"encoders": [lambda x: LINEAR(x).sum()]}, ValueError, r"encoders\[0\] must return tensors with one entry per"),
    ({"encoders": [lambda x: (LINEAR(x), 3)]}, ValueError,
     r"encoders\[0\] must return tensors .*, 2 here, or None, got 3"),
    ({"encoders": [uneven], "micro_batch_size": 3}, ValueError,
     r"encoders\[0\] must return the same .* pad to the longest of the batch; got \(3, 3\) .* and \(1, 1\)"),
])  # fmt: skip
def test_wrong_input_is_named(change):
    given, error, said = change
    with pytest.raises(error, match=said):
        gradient_cached_backward(**{**RIGHT, **given})
