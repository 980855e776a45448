"""align_fragments against the formulas written out as loops, and what it promises besides."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_near, generator, gradients, random_mask, repad
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from hrem_layers import align_fragments
from hrem_layers.alignment.block import _largest
from hrem_layers.alignment.reference import align_by_loops

MODES = ("scan", "cosine", "dot")
pytestmark = pytest.mark.usefixtures("cpu_alignment")


def fragments(n, width, dim, seed, dtype=torch.float64):
    return torch.randn(n, width, dim, generator=generator(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("image_masked", "text_masked"), [(False, False), (True, False), (False, True), (True, True)])
@settings(max_examples=10)
@given(
    i=st.integers(1, 4), t=st.integers(1, 4), r=st.integers(1, 5), w=st.integers(1, 5), dim=st.integers(2, 4),
    topk=st.integers(1, 7), chunk_size=st.none() | st.integers(1, 20), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_value_and_gradient_are_those_of_the_loop(
    i, t, r, w, dim, mode, topk, chunk_size, image_masked, text_masked, seed
):
    images, texts = (fragments(n, m, dim, seed + n).requires_grad_() for n, m in ((i, r), (t, w)))
    image_mask = random_mask(i, r, seed + 1, at_least=0) if image_masked else None
    text_mask = random_mask(t, w, seed + 2, at_least=0) if text_masked else None
    ours = align_fragments(images, texts, image_mask, text_mask, topk=topk, mode=mode, chunk_size=chunk_size)
    loop = align_by_loops(images, texts, image_mask, text_mask, topk=topk, mode=mode)
    for name, x, y in zip(ours._fields, ours, loop, strict=True):
        assert_near(x, y, 1e-10, name)
    inputs = {"images": images, "texts": texts}
    if not any(y.requires_grad for y in loop):  # no real fragment anywhere
        return
    ours_grad, loop_grad = gradients(inputs, *ours), gradients(inputs, *loop)
    scale = max(x.abs().max() for x in loop_grad.values())
    for name in inputs:
        # with a single word a norm over the words leaves the sign alone: a gradient of 0, up to rounding
        error = (ours_grad[name] - loop_grad[name]).abs().max()
        assert error <= 1e-8 * max(scale, 1.0), (name, error)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck(mode, masked):
    images, texts = fragments(2, 4, 3, 0).requires_grad_(), fragments(2, 3, 3, 1).requires_grad_()
    masks = (random_mask(2, 4, 1), random_mask(2, 3, 1)) if masked else (None, None)
    for topk, chunk_size in ((2, 2), (6, None)):
        assert torch.autograd.gradcheck(
            lambda r, c, k=topk, size=chunk_size: align_fragments(r, c, *masks, topk=k, mode=mode, chunk_size=size),
            (images, texts),
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_numbers_do_not_depend_on_the_chunk(mode, masked):
    images, texts = fragments(7, 5, 6, 0).requires_grad_(), fragments(9, 4, 6, 1).requires_grad_()
    masks = (random_mask(7, 5, 0, at_least=0), random_mask(9, 4, 1, at_least=0)) if masked else (None, None)
    inputs = {"images": images, "texts": texts}

    def run(chunk_size):
        out = align_fragments(images, texts, *masks, topk=3, mode=mode, chunk_size=chunk_size)
        return [*out, *gradients(inputs, *out).values()]

    whole = run(10**9)
    for chunk_size in (1, 2, 3, 5, 7, 8, 20, 62, 63, None):
        for x, y in zip(run(chunk_size), whole, strict=True):
            assert_near(x, y, 1e-12, f"chunk_size={chunk_size}")


@settings(max_examples=30)
@given(
    r=st.integers(1, 5), w=st.integers(1, 5), extra=st.integers(0, 4), mode=st.sampled_from(MODES),
    fill=st.sampled_from([None, math.nan, math.inf, -math.inf, 1e300]), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_padding_may_hold_anything_anywhere(r, w, extra, mode, fill, seed):
    images, texts = fragments(3, r, 4, seed).requires_grad_(), fragments(4, w, 4, seed + 1).requires_grad_()
    image_mask, text_mask = random_mask(3, r, seed + 2, at_least=0), random_mask(4, w, seed + 3, at_least=0)
    here = align_fragments(images, texts, image_mask, text_mask, topk=3, mode=mode)
    wide_images, wide_image_mask, image_back = repad(images, image_mask, fill=fill, extra=extra, seed=seed)
    wide_texts, wide_text_mask, text_back = repad(texts, text_mask, fill=fill, extra=extra + 1, seed=seed)
    there = align_fragments(wide_images, wide_texts, wide_image_mask, wide_text_mask, topk=3, mode=mode)
    for name, x, y in zip(here._fields, there, here, strict=True):
        assert_near(x, y, 1e-11, name)
    here_grad = gradients({"images": images, "texts": texts}, *here)
    there_grad = gradients({"images": wide_images, "texts": wide_texts}, *there)
    for name, mask, back in (("images", wide_image_mask, image_back), ("texts", wide_text_mask, text_back)):
        assert not there_grad[name][~mask].any()
        error = (back(there_grad[name]) - here_grad[name]).abs().max()
        assert error <= 1e-9 * max(1.0, here_grad[name].abs().max()), name


@pytest.mark.parametrize("mode", MODES)
def test_order_of_both_batches(mode):
    images, texts = fragments(4, 5, 6, 0), fragments(6, 3, 6, 1)
    image_mask, text_mask = random_mask(4, 5, 0), random_mask(6, 3, 1)
    whole = align_fragments(images, texts, image_mask, text_mask, topk=3, mode=mode)
    rows, columns = torch.tensor([2, 0, 3, 1]), torch.tensor([5, 1, 0, 2, 4, 3])
    picked = align_fragments(images[rows], texts[columns], image_mask[rows], text_mask[columns], topk=3, mode=mode)
    for name, x, y in zip(whole._fields, picked, whole, strict=True):
        first, second = (rows, columns) if name.endswith("i2t") else (columns, rows)
        assert_near(x, y[first][:, second], 1e-12, name)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("side", ["image", "text", "both"])
def test_nothing_real_gives_zeros(mode, side):
    images, texts = fragments(3, 4, 5, 0).requires_grad_(), fragments(3, 2, 5, 1).requires_grad_()
    image_mask, text_mask = torch.ones(3, 4, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)
    if side != "text":
        image_mask[1] = False
    if side != "image":
        text_mask[1] = False
    out = align_fragments(images, texts, image_mask, text_mask, topk=3, mode=mode)
    for name, x in zip(out._fields, out, strict=True):
        lead_is_image = name.endswith("i2t")
        if side != "text":
            assert not (x[1] if lead_is_image else x[:, 1]).any(), name
        if side != "image":
            assert not (x[:, 1] if lead_is_image else x[1]).any(), name
        assert x[0, 0].any(), name
    for x in gradients({"images": images, "texts": texts}, *out).values():
        assert torch.isfinite(x).all()
    full = align_fragments(images, texts, topk=3, mode=mode)
    for x, y in zip(out, full, strict=True):
        assert_near(x[[0, 2]][:, [0, 2]], y[[0, 2]][:, [0, 2]], 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_all_negative_similarities_are_kept_although_padding_counts_as_zero(mode):
    regions = torch.tensor([[[1.0, 0.1], [1.0, 0.2], [9.0, 9.0]]], dtype=torch.float64)
    words = -regions
    mask = torch.tensor([[True, True, False]])
    out = align_fragments(regions, words, mask, mask, topk=4, mode=mode)
    loop = align_by_loops(regions, words, mask, mask, topk=4, mode=mode)
    for x, y in zip(out, loop, strict=True):
        assert_near(x, y, 1e-12)
    assert (out.mean_i2t < 0).all()
    assert (out.top_t2i[..., :2] < 0).all()
    assert not out.top_t2i[..., 2:].any()


@pytest.mark.parametrize("mode", MODES)
def test_zero_vectors_among_the_real_fragments(mode):
    images, texts = fragments(2, 3, 4, 0), fragments(2, 3, 4, 1)
    images[0, 1] = texts[1] = 0
    images, texts = images.requires_grad_(), texts.requires_grad_()
    out = align_fragments(images, texts, topk=2, mode=mode)
    assert all(torch.isfinite(x).all() for x in out)
    assert not out.mean_i2t[:, 1].any()
    assert all(torch.isfinite(x).all() for x in gradients({"images": images, "texts": texts}, *out).values())


def test_q_is_padded_with_zeros_and_sorted():
    images, texts = fragments(2, 5, 4, 0), fragments(3, 2, 4, 1)
    image_mask = torch.tensor([[True, True, False, True, False], [True] * 5])
    out = align_fragments(images, texts, image_mask, topk=4)
    assert out.top_i2t.shape == (2, 3, 4)
    assert out.top_t2i.shape == (3, 2, 4)
    assert out.top_i2t[0, :, :3].all()
    assert not out.top_i2t[0, :, 3].any()
    assert not out.top_t2i[..., 2:].any()
    assert (out.top_i2t[1].diff(dim=-1) <= 0).all()


def test_leaves_its_inputs_alone():
    images, texts = fragments(2, 3, 4, 0), fragments(2, 3, 4, 1)
    before = images.clone(), texts.clone()
    align_fragments(images, texts, random_mask(2, 3, 0), None, mode="dot")
    assert torch.equal(images, before[0])
    assert torch.equal(texts, before[1])


def test_strided_and_expanded_inputs():
    images, texts = fragments(2, 6, 8, 0), fragments(3, 4, 8, 1)
    strided = align_fragments(images[:, ::2, ::2], texts.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2])
    plain = align_fragments(images[:, ::2, ::2].contiguous(), texts[..., ::2].contiguous())
    for x, y in zip(strided, plain, strict=True):
        assert_near(x, y, 1e-12)
    leaf = fragments(1, 6, 8, 0).requires_grad_()
    out = align_fragments(leaf.expand(2, 6, 8), texts)
    assert_near(out.mean_i2t[0], out.mean_i2t[1], 1e-12)
    out.mean_i2t.sum().backward()  # an expanded gradient of ones
    assert torch.isfinite(leaf.grad).all()


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("image_dtype", DTYPES)
@pytest.mark.parametrize("text_dtype", DTYPES)
@pytest.mark.parametrize("mode", MODES)
def test_every_two_dtypes_give_what_the_wider_gives(image_dtype, text_dtype, mode):
    """Half types are only rounded when they come in and when the gradient goes out."""
    inputs = {
        "images": fragments(3, 5, 16, 0, image_dtype).requires_grad_(),
        "texts": fragments(4, 6, 16, 1, text_dtype).requires_grad_(),
    }
    wides = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    masks = random_mask(3, 5, 0), random_mask(4, 6, 1)
    ours, exact = (align_fragments(*x.values(), *masks, topk=3, mode=mode) for x in (inputs, wides))
    wide = torch.float64 if torch.float64 in (image_dtype, text_dtype) else torch.float32
    for name, x, y in zip(ours._fields, ours, exact, strict=True):
        assert x.dtype == wide, name
        assert_near(x, y, 50 * torch.finfo(wide).eps, name)
    ours_grad, exact_grad = gradients(inputs, *ours), gradients(wides, *exact)
    for name, leaf in inputs.items():
        assert ours_grad[name].dtype == leaf.dtype
        assert_near(ours_grad[name], exact_grad[name], 50 * torch.finfo(wide).eps + torch.finfo(leaf.dtype).eps, name)


def test_autocast():
    images, texts = fragments(3, 5, 16, 0, torch.float32), fragments(4, 6, 16, 1, torch.float32)
    plain = align_fragments(images, texts)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = align_fragments(images, texts)
    for x, y in zip(cast, plain, strict=True):
        assert x.dtype == torch.float32
        assert_near(x, y, 0.06)
        assert not torch.equal(x, y)  # it did multiply in bfloat16


def test_autocast_takes_the_dtypes_that_encoders_return_under_it():
    # under autocast one encoder ends in a linear layer (bfloat16), the other in a norm (float32)
    images, texts = fragments(3, 5, 16, 0, torch.bfloat16), fragments(4, 6, 16, 1, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = align_fragments(images, texts)
    assert_near(out.mean_i2t, align_fragments(images.float(), texts).mean_i2t, 0.06)


def peak_bytes(function):
    """The most memory that tensors made inside hold at one time."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_size", [16, 64])
def test_working_memory_is_that_of_a_chunk(masked, chunk_size):
    n = r = w = 32
    images, texts = (fragments(n, m, 8, 0, torch.float32) for m in (r, w))
    # many lengths, and gaps: what is packed must not exceed the chunk either
    masks = [torch.arange(m) < torch.arange(n).unsqueeze(1) % 5 + m - 4 for m in (r, w)] if masked else (None, None)
    chunk, whole = (4 * r * w * pairs for pairs in (chunk_size, n * n))
    given_and_returned = 400_000  # bytes: fragments, their normalised copies, p and q
    bound = given_and_returned + 12 * chunk
    assert bound < whole
    assert peak_bytes(lambda: align_fragments(images, texts, *masks, topk=4, chunk_size=chunk_size)) <= bound


def test_training_keeps_at_most_64_mb_of_similarities():
    n, r, w = 128, 44, 44
    images, texts = (fragments(n, m, 8, 0, torch.float32).requires_grad_() for m in (r, w))
    whole = 4 * n * n * r * w
    bound = (64 + 20 + 30) * 2**20  # kept, given and returned, the default chunk
    assert whole > bound
    out = align_fragments(images, texts)
    assert peak_bytes(lambda: align_fragments(images, texts)) <= bound
    assert peak_bytes(lambda: torch.autograd.grad(out.mean_t2i.sum(), (images, texts))) <= bound


class Recorder(TorchDispatchMode):
    """The library's own operators that are called inside, with their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "hrem_layers":
            self.calls[func] = args, kwargs or {}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("masked", [False, True])
def test_operators_are_well_formed(masked):
    images, texts = fragments(3, 4, 5, 0, torch.float32).requires_grad_(), fragments(2, 3, 5, 1, torch.float32)
    masks = (random_mask(3, 4, 0), random_mask(2, 3, 1)) if masked else (None, None)
    with Recorder() as recorder:
        out = align_fragments(images, texts, *masks, topk=3, chunk_size=2)
        out.mean_i2t.sum().backward()
    names = {str(op) for op in recorder.calls}
    assert names == {"hrem_layers.align_fragments.default", "hrem_layers.align_fragments_backward.default"}
    for op, (args, kwargs) in recorder.calls.items():
        differentiable = "backward" not in str(op)
        args = [
            x.detach().requires_grad_(differentiable and x.dtype.is_floating_point)
            if isinstance(x, torch.Tensor) else x for x in args
        ]  # fmt: skip
        torch.library.opcheck(op, tuple(args), kwargs)


@pytest.mark.parametrize("n", [1, 9, 31, 32, 36, 41, 49, 63, 64, 73, 100])
@pytest.mark.parametrize("dim", [1, 3])
def test_the_largest_of_a_row_is_that_of_amax(n, dim):
    shape = (3, n, 4, 5) if dim == 1 else (3, 4, 5, n)
    x = torch.randn(*shape).round(decimals=1)  # with equal values
    x.view(-1)[::37] = torch.nan
    x = x.transpose(0, 2) if n == 49 else x
    out = torch.empty(x.amax(dim).shape)
    for found in (_largest(x, dim), _largest(x, dim, out), out):
        assert torch.equal(found.nan_to_num(9), x.amax(dim).nan_to_num(9))
    leaf = torch.randn(*shape, requires_grad=True)
    (grad,) = torch.autograd.grad(_largest(leaf, dim).sum(), leaf)
    assert torch.equal(grad, (leaf == leaf.amax(dim, keepdim=True)).float())
