"""Every way to compute the alignment against the formulas written out as loops.

Packed tiles, padded tiles, compiled kernels, any chunk, with and without similarities kept for backward, and the fused
kernel in Triton's interpreter. The interpreter must be chosen before Triton is imported, so the kernel runs in a
process of its own: this file, run as a script.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hrem_layers.alignment import align_fragments, block, cuts, op, tiles
from hrem_layers.alignment.cpu import launch as cpu
from hrem_layers.alignment.gpu import launch
from hrem_layers.alignment.reference import align_by_loops
from hrem_layers.alignment.scores import PairGrads, Scores

MODES = ("scan", "cosine", "dot")


def tiled(images, texts, image_mask, text_mask, grad, *, mode, topk, packed, chunk_size, kept):
    setting = cuts.Setting(mode, topk, chunk_size, packed, images.dtype)
    buffer = images.new_full((kept,), torch.nan)
    scores = tiles.score_all(images, texts, image_mask, text_mask, setting, buffer)
    grads = PairGrads.of(*grad)
    return [*scores, *tiles.score_all_backward(images, texts, image_mask, text_mask, grads, setting, buffer)]


def fused(images, texts, image_mask, text_mask, grad, *, mode, topk):
    options = {"mode": mode, "topk": topk, "dtype": images.dtype}
    tensors = images, texts, image_mask, text_mask
    return [*launch.score_all_fused(*tensors, **options), *launch.score_all_fused_backward(*tensors, grad, **options)]


@st.composite
def cases(draw, most_items, most_width, most_dim):
    """(images, texts, image mask, text mask, gradients), mode, topk; masks need not be prefixes nor hold anything."""
    i, t = (draw(st.integers(1, most_items)) for _ in range(2))
    r, w = (draw(st.integers(1, most_width)) for _ in range(2))
    dim, topk, mode = draw(st.integers(2, most_dim)), draw(st.integers(1, most_width + 2)), draw(st.sampled_from(MODES))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    share = draw(st.sampled_from([0.2, 0.7]))
    masks = [torch.rand(n, m, generator=g) < share if draw(st.booleans()) else None for n, m in ((i, r), (t, w))]
    images, texts = (torch.randn(n, m, dim, generator=g, dtype=torch.float64) for n, m in ((i, r), (t, w)))
    shapes = (i, t), (t, i), (i, t, topk), (t, i, topk)
    grad = Scores(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))
    return (images, texts, *masks, grad), mode, topk


def by_loop(images, texts, image_mask, text_mask, grad, mode, topk):
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    scores = align_by_loops(images, texts, image_mask, text_mask, topk=topk, mode=mode)
    total = sum((x * y).sum() for x, y in zip(scores, grad, strict=True))
    return [*(x.detach() for x in scores), *torch.autograd.grad(total, (images, texts))]


def recorded_sides(monkeypatch):
    sides, make_side = [], cuts.make_side
    monkeypatch.setattr(cuts, "make_side", lambda *a, **k: sides.append(make_side(*a, **k)) or sides[-1])
    return sides


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("n", "r"), [(64, 1), (33, 3), (70, 4), (32, 36)])
@pytest.mark.parametrize("masked", [False, True])
def test_images_that_stand_region_by_region_give_what_the_loops_give(monkeypatch, mode, n, r, masked):
    """On a CPU a tile of a multiple of 32 images without a mask has another layout: tiles of 32, and what is left."""
    monkeypatch.setattr(cuts, "_CPU_TILE", 32 * r * 3 * 4)
    g = torch.Generator().manual_seed(0)
    t, w, dim, topk = 3, 4, 6, 3
    images, texts = (torch.randn(a, b, dim, generator=g, dtype=torch.float64) for a, b in ((n, r), (t, w)))
    mask = torch.rand(t, w, generator=g) < 0.7 if masked else None
    shapes = (n, t), (t, n), (n, t, topk), (t, n, topk)
    grad = Scores(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes))
    case = images, texts, None, mask, grad
    sides = recorded_sides(monkeypatch)
    expected = by_loop(*case, mode, topk)
    for kept in (0, 2**16):
        got = tiled(*case, mode=mode, topk=topk, packed=True, chunk_size=None, kept=kept)
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert any(side.by_place for side in sides) == (n != 33)


def check(actual, expected, tolerance):
    """``tolerance`` is relative to the largest number; gradients may be tiny differences of large ones."""
    names = (*Scores._fields, "grad of images", "grad of texts")
    largest = max(1.0, max(float(x.abs().max()) for x in expected[4:]))
    for name, x, y in zip(names, actual, expected, strict=True):
        assert x.shape == y.shape, (name, x.shape, y.shape)
        assert torch.isfinite(x).all(), name
        error = float((x.double() - y).abs().max())
        scale = largest if name.startswith("grad") else max(1.0, float(y.abs().max()))
        assert error <= tolerance * scale, f"{name}: off by {error:.3g} where the largest is {scale:.3g}"


@settings(max_examples=60, deadline=None)
@given(
    case=cases(4, 6, 5), packed=st.booleans(), chunk_size=st.none() | st.integers(1, 20),
    kept=st.sampled_from([0, 7, 60, 5000]), least_block=st.sampled_from([1, 10, 50, 2**16]),
)  # fmt: skip
def test_tiles_are_the_loop(case, packed, chunk_size, kept, least_block):
    tensors, mode, topk = case
    options = {"mode": mode, "topk": topk, "packed": packed, "chunk_size": chunk_size, "kept": kept}
    with mock.patch.object(cuts, "_CPU_LEAST_BLOCK", least_block):
        check(tiled(*tensors, **options), by_loop(*tensors, mode, topk), 1e-8)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("least_block", [1, 2**16])
def test_regions_that_tie_share_evenly_however_the_images_are_put_together(monkeypatch, mode, least_block):
    """What fills up a run is a fragment again, which must not count twice where values tie."""
    monkeypatch.setattr(cuts, "_CPU_LEAST_BLOCK", least_block)
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(3, 4, 5, generator=g, dtype=torch.float64) for _ in range(2))
    images[:, 1], texts[:, 1] = images[:, 0], texts[:, 0]
    masks = [torch.arange(4) < torch.tensor(lengths)[:, None] for lengths in ([2, 3, 4], [2, 4, 2])]
    grad = Scores(*(torch.randn(shape, generator=g, dtype=torch.float64) for shape in [(3, 3)] * 2 + [(3, 3, 2)] * 2))
    case = images, texts, *masks, grad
    got = tiled(*case, mode=mode, topk=2, packed=True, chunk_size=None, kept=10_000)
    check(got, by_loop(*case, mode, 2), 1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_small_blocks_are_put_together(monkeypatch, mode):
    """Not a block for each number of regions and each of words: of 16 by 16 items that took ten times as long."""
    g = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(16, width, 8, generator=g) for width in (20, 12))
    masks = [torch.arange(x.shape[1]) < torch.randint(1, x.shape[1] + 1, (16, 1), generator=g) for x in (images, texts)]
    setting = cuts.Setting(mode, 3, None, True, torch.float32)
    sides, counts = recorded_sides(monkeypatch), []
    for least_block in (1, 2**10, 2**16):
        monkeypatch.setattr(cuts, "_CPU_LEAST_BLOCK", least_block)
        sides.clear()
        tiles.score_all(images, texts, *masks, setting, torch.empty(0))
        counts.append([len(side.runs) for side in sides])
    similarities = masks[0].sum() * masks[1].sum()
    assert counts[0] == [len(mask.sum(dim=1).unique()) for mask in reversed(masks)]
    assert 1 < counts[1][0] * counts[1][1] <= similarities // 2**10
    assert counts[2] == [1, 1]


@settings(max_examples=60, deadline=None)
@given(case=cases(4, 6, 5), asked=st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_scores_that_no_gradient_flows_back_from_are_zeros(case, asked):
    (*tensors, grad), mode, topk = case
    leaves = [x.clone().requires_grad_() for x in tensors[:2]]
    scores = align_fragments(*leaves, *tensors[2:], mode=mode, topk=topk)
    used = [(x * y).sum() for x, y, ask in zip(scores, grad, asked, strict=True) if ask]
    zeros = [y if ask else torch.zeros_like(y) for y, ask in zip(grad, asked, strict=True)]
    got = torch.autograd.grad(sum(used), leaves, retain_graph=True)
    expected = torch.autograd.grad(scores, leaves, zeros)
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def test_only_what_is_asked_for_is_pooled_back(monkeypatch):
    monkeypatch.setattr(op, "compiled_applies", lambda *_: False)
    asked = []
    pool_backward = block.pool_backward
    monkeypatch.setattr(
        block, "pool_backward", lambda *a: asked.append([x is None for x in a[2:4]]) or pool_backward(*a)
    )
    images, texts = torch.randn(3, 4, 5, requires_grad=True), torch.randn(3, 6, 5)
    align_fragments(images, texts).mean_t2i.sum().backward()
    assert asked == [[False, True]]


def compiled(images, texts, image_mask, text_mask, grad, *, mode, topk, chunk_size=None, kept=0, dtype=None):
    setting = cuts.Setting(mode, topk, chunk_size, True, dtype or images.dtype)
    buffer = images.new_full((kept,), torch.nan, dtype=grad[0].dtype)
    tensors = images, texts, image_mask, text_mask
    scores = cpu.score_all_compiled(*tensors, setting, buffer)
    grads = cpu.score_all_compiled_backward(*tensors, grad, setting, buffer)
    assert not buffer.isnan().any()
    assert (scores is None) == (grads is None)
    return None if scores is None else [*scores, *grads]


needs_numba = pytest.mark.skipif(not cpu._has_numba(), reason="the compiled kernels need Numba, of the extra cpu")


@needs_numba
@settings(max_examples=150, deadline=None)
@given(
    case=cases(5, 7, 5), chunk_size=st.none() | st.integers(1, 20), kept=st.sampled_from([0, 60, 5000]),
    threads=st.integers(1, 3),
)  # fmt: skip
def test_compiled_kernels_are_the_loop(case, chunk_size, kept, threads):
    tensors, mode, topk = case
    expected = by_loop(*tensors, mode, topk)
    with mock.patch.object(cpu, "_LEAST_SHARE", 1), mock.patch.object(torch, "get_num_threads", lambda: threads):
        got = compiled(*tensors, mode=mode, topk=topk, chunk_size=chunk_size, kept=kept)
    check(got, expected, 1e-8)


def large_case(mode, seed=0, n=70, t=40, r=37, w=9, dim=8):
    """More images than a chunk has, of several numbers of regions."""
    g = torch.Generator().manual_seed(seed)
    images, texts = (torch.randn(a, b, dim, generator=g, dtype=torch.float64) for a, b in ((n, r), (t, w)))
    masks = [torch.rand(a, b, generator=g) < 0.8 for a, b in ((n, r), (t, w))]
    shapes = (n, t), (t, n), (n, t, 3), (t, n, 3)
    return images, texts, *masks, Scores(*(torch.randn(x, generator=g, dtype=torch.float64) for x in shapes))


@needs_numba
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kept", [0, 2**20])
def test_compiled_kernels_are_the_packed_tiles(monkeypatch, mode, masked, kept):
    """Also of several chunks and tiles, and of several threads with the same bits as of one."""
    monkeypatch.setattr(cpu, "_TILE", 2**14)
    images, texts, image_mask, text_mask, grad = large_case(mode)
    case = images, texts, image_mask if masked else None, text_mask, grad
    expected = tiled(*case, mode=mode, topk=3, packed=True, chunk_size=None, kept=0)
    one = compiled(*case, mode=mode, topk=3, kept=kept)
    check(one, expected, 1e-12)
    monkeypatch.setattr(cpu, "_LEAST_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for x, y in zip(compiled(*case, mode=mode, topk=3, kept=kept), one, strict=True):
        assert torch.equal(x, y)


@needs_numba
def test_each_thread_gets_its_texts_with_their_rows_and_scales(monkeypatch):
    monkeypatch.setattr(cpu, "_LEAST_SHARE", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    *tensors, _ = large_case("dot", n=5)
    given = cpu._Given.of(*tensors, cuts.Setting("dot", 3, None, True, torch.float64))
    shares = given.shares(slice(0, len(given.texts.texts)), 10**6)
    assert len(shares) == 3
    for share in shares:
        for text, start, stop, scale in zip(share.texts, share.starts[:-1], share.starts[1:], share.scale, strict=True):
            words = given.text_rows.rows[start:stop]
            assert torch.equal(words, tensors[1][text][tensors[3][text]])
            assert scale == pytest.approx(8 * torch.finfo(torch.float64).eps * float(words.norm(dim=1).max()))
    assert [text for share in shares for text in share.texts] == given.texts.texts.tolist()


@needs_numba
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_kernels_in_smaller_dtypes(mode, dtype):
    images, texts, *masks, grad = large_case(mode, n=9, t=8)
    case = images.to(dtype), texts.to(dtype), *masks, Scores(*(x.float() for x in grad))
    for product in {torch.float32, dtype}:
        got = compiled(*case, mode=mode, topk=3, dtype=product)
        setting = cuts.Setting(mode, 3, None, True, product)
        buffer = torch.empty(0)
        scores = tiles.score_all(*case[:4], setting, buffer)
        expected = *scores, *tiles.score_all_backward(*case[:4], PairGrads.of(*case[4]), setting, buffer)
        assert [x.dtype for x in got] == [x.dtype for x in expected]
        check(got, [x.double() for x in expected], 1e-5 if dtype == torch.float32 else 2e-2)


@needs_numba
@pytest.mark.parametrize("length", [1e-30, 1e-19, 1e19, 1e30])
@pytest.mark.parametrize("mode", ["scan", "cosine"])
def test_compiled_kernels_normalise_vectors_of_any_length(length, mode):
    images, texts, *masks, grad = large_case(mode, n=5, t=4)
    case = images.float(), texts.float(), *masks, Scores(*(x.float() for x in grad))
    expected = compiled(*case, mode=mode, topk=3)
    long = images.float()
    long[2] *= length
    got = compiled(long, *case[1:], mode=mode, topk=3)
    expected[4][2] /= length
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-3, atol=1e-5)


@needs_numba
@pytest.mark.parametrize(
    ("mode", "side", "value"),
    [*((mode, side, value) for mode in MODES for side in (0, 1) for value in (math.nan, math.inf)), ("dot", 0, 1e38)],
)
def test_what_may_not_be_finite_is_left_to_the_tiles(mode, side, value):
    """The kernels' maxima do not see NaN. In padding it may stand."""
    images, texts, *masks, grad = large_case(mode, n=5, t=4)
    case = [images.float(), texts.float(), *masks, Scores(*(x.float() for x in grad))]
    case[side][1, 0], case[2 + side][1, 0] = value, True
    assert compiled(*case, mode=mode, topk=3) is None
    scores = align_fragments(*case[:4], mode=mode)
    assert value == 1e38 or not (scores.mean_i2t if side == 0 else scores.mean_t2i)[1].isfinite().any()
    case[2 + side][1, 0] = False
    assert all(x.isfinite().all() for x in compiled(*case, mode=mode, topk=3))


@needs_numba
def test_what_a_half_type_cannot_hold_is_left_to_the_tiles():
    images, texts, *masks, grad = large_case("dot", n=5, t=4)
    case = images.float() * 1e5, texts.float() * 1e-5, *masks, Scores(*(x.float() for x in grad))
    assert compiled(*case, mode="dot", topk=3, dtype=torch.float16) is None
    assert compiled(*case, mode="dot", topk=3, dtype=torch.float32) is not None


def without_numba(monkeypatch, find_spec, import_module):
    monkeypatch.setattr(cpu.importlib.util, "find_spec", find_spec)
    monkeypatch.setattr(cpu.importlib, "import_module", import_module)
    return cpu._has_numba.__wrapped__()


def test_numba_that_cannot_be_imported_is_named_once(monkeypatch):
    def fails(name):
        raise ImportError("Numba needs NumPy 2.3 or less")

    with pytest.warns(RuntimeWarning, match=r"cannot be imported \(Numba needs NumPy 2.3 or less\)"):
        assert without_numba(monkeypatch, lambda name: object(), fails) is False
    assert without_numba(monkeypatch, lambda name: None, fails) is False


@needs_numba
def test_the_kernels_stay_within_their_arrays(tmp_path):
    """Compiled code checks no index unless asked to: a row of a tile is longer than its columns, to begin with."""
    script = """
import itertools, torch
from hrem_layers import align_fragments
def some(n, masked): return torch.rand(n) < 0.6 if masked else None
sizes = (5, 36, 6, 20), (1, 1, 1, 1), (70, 3, 9, 4), (3, 49, 2, 30)
for mode, (i, r, t, w), masked, k in itertools.product(("cosine", "dot", "scan"), sizes, (False, True), (1, 10)):
    images, texts = torch.randn(i, r, 12, requires_grad=True), torch.randn(t, w, 12, requires_grad=True)
    masks = some((i, r), masked), some((t, w), masked)
    sum(x.sum() for x in align_fragments(images, texts, *masks, mode=mode, topk=k)).backward()
"""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@needs_numba
def test_a_cache_that_cannot_be_written_to_is_done_without():
    """The package's folder and the user's may both be read-only, in a container."""
    script = """
from unittest import mock
import numba.core.caching as caching, torch
with mock.patch.object(caching.CacheImpl, "__init__", side_effect=RuntimeError("no locator available")):
    from hrem_layers import align_fragments
    align_fragments(torch.randn(2, 3, 4), torch.randn(2, 3, 4))
import sys; assert "hrem_layers.alignment.cpu.kernel" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not launch._has_triton(), reason="the kernel's interpreter comes with triton, 3.5 or newer")
def test_the_kernel_is_the_loop():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__))], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "kernel cases: " in done.stdout


def kernel_in_the_interpreter():
    count = 0

    @settings(max_examples=10, deadline=None, database=None, derandomize=True)
    @given(case=cases(3, 20, 20))
    def kernel_is_the_loop(case):
        nonlocal count
        count += 1
        (images, texts, image_mask, text_mask, grad), mode, topk = case
        # the loop gets what float32 makes of the input, so that only the kernel's own rounding differs
        images, texts = images.float(), texts.float()
        actual = fused(images, texts, image_mask, text_mask, Scores(*(x.float() for x in grad)), mode=mode, topk=topk)
        check(actual, by_loop(images.double(), texts.double(), image_mask, text_mask, grad, mode, topk), 2e-4)

    kernel_is_the_loop()
    print(f"kernel cases: {count}")


if __name__ == "__main__":
    kernel_in_the_interpreter()
