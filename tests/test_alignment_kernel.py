"""The fused kernel on sizes that matter to it, in Triton's interpreter, and how it is chosen and launched.

The interpreter must be chosen before Triton is imported: the cases run in one process of their own (this file as a
script), which prints each case's error against the float64 tiles; the tests here read them. The kernel's compilation
for real GPUs needs none and is tested too (slow).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hrem_layers.alignment import align_fragments
from hrem_layers.alignment.gpu import launch
from hrem_layers.alignment.gpu.arguments import Products, Sizes
from hrem_layers.alignment.scores import PairScores, Scores

needs_triton = pytest.mark.skipif(not launch._has_triton(), reason="needs triton, 3.5 or newer")

# name: images, regions, texts, words, dim, topk, mode, image mask, text mask, dtype, elements of grad_x at one time
CASES = {
    "the release's widths": (3, 36, 3, 24, 40, 10, "scan", False, True, "float32", 2**26),
    "no masks": (3, 36, 4, 8, 16, 10, "scan", False, False, "float32", 2**26),
    "masked regions": (5, 36, 3, 20, 33, 10, "scan", True, True, "float32", 2**26),
    "one region, one word": (3, 1, 2, 1, 7, 3, "scan", False, False, "float32", 2**26),
    "topk beyond both": (2, 5, 3, 4, 8, 50, "scan", True, True, "float32", 2**26),
    "three lengths of texts": (3, 17, 5, 40, 12, 10, "scan", False, True, "float32", 2**26),
    "regions without idle columns": (2, 32, 3, 16, 20, 10, "scan", True, True, "float32", 2**26),
    "widest regions": (2, 200, 2, 5, 8, 10, "scan", False, True, "float32", 2**26),
    "widest texts": (2, 4, 2, 128, 8, 10, "scan", False, True, "float32", 2**26),
    "cosine": (3, 20, 4, 12, 16, 5, "cosine", True, True, "float32", 2**26),
    "dot": (3, 20, 4, 12, 16, 5, "dot", True, True, "float32", 2**26),
    "in chunks": (3, 20, 4, 12, 9, 10, "scan", True, True, "float32", 2 * 12 * 20 * 2),
    "ties in scan": (4, 20, 5, 12, 9, 4, "scan", True, True, "float32", 2**26),
    "ties in cosine": (4, 40, 5, 12, 9, 4, "cosine", False, True, "float32", 2**26),
    "ties in dot": (4, 20, 5, 12, 9, 4, "dot", True, True, "float32", 2**26),
    "half precision": (4, 36, 4, 20, 64, 10, "scan", True, True, "float16", 2**26),
}
TOLERANCE = {"float32": 2e-4, "float16": 2e-2}


def run_case(name, images, regions, texts, words, dim, topk, mode, image_masked, text_masked, dtype, elements):
    """The kernel's largest error relative to the largest number, for each of values and gradients."""
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    r, c = (torch.randn(n, m, dim, generator=g).to(dtype) for n, m in ((images, regions), (texts, words)))
    if "ties" in name:
        r[:, 1:5], c[:, 2:5] = r[:, :1], c[:, 1:2]
        r[0] = c[0] = 0
    image_mask = torch.rand(images, regions, generator=g) < 0.7 if image_masked else None
    text_mask = None
    if text_masked:  # prefixes of every length, one with a hole, one empty
        text_mask = torch.arange(words) < torch.linspace(0, words, texts).ceil().unsqueeze(1)
        text_mask[-1, words // 2] = False
        c = c.masked_fill(~text_mask.unsqueeze(2), torch.nan)
    shapes = (images, texts), (texts, images), (images, texts, topk), (texts, images, topk)
    grad = Scores(*(torch.randn(shape, generator=g) for shape in shapes))

    launch._CHUNK = elements
    launch._TILE = 2**10 if "release" in name else 2**12  # the interpreter is quicker with few programs
    launch._CHUNK_ROWS = min(elements, launch._CHUNK_ROWS)
    options = {"mode": mode, "topk": topk, "dtype": dtype}
    actual = [
        *launch.score_all_fused(r, c, image_mask, text_mask, **options),
        *launch.score_all_fused_backward(r, c, image_mask, text_mask, grad, **options),
    ]
    assert all(x.dtype == dtype for x in actual[4:]) and all(x.dtype == torch.float32 for x in actual[:4])
    r64, c64 = r.double().requires_grad_(), c.double().requires_grad_()
    scores = align_fragments(r64, c64, image_mask, text_mask, topk=topk, mode=mode)
    total = sum((x * y.double()).sum() for x, y in zip(scores, grad, strict=True))
    expected = [*(x.detach() for x in scores), *torch.autograd.grad(total, (r64, c64))]
    largest = max(float(x.abs().max()) for x in expected[4:])  # a gradient may be the tiny difference of large terms
    scales = [*(float(x.abs().max()) for x in expected[:4]), max(1.0, largest), max(1.0, largest)]
    return max(
        float((x.double() - y).abs().max()) / scale if torch.isfinite(x).all() else float("inf")
        for x, y, scale in zip(actual, expected, scales, strict=True)
    )


def not_finite_case():
    """0 if NaN in one region makes p and q of all pairs of its image NaN, and no others."""
    r, c = torch.randn(3, 5, 8), torch.randn(4, 6, 8)
    clean = launch.score_all_fused(r, c, None, None, mode="cosine", topk=2, dtype=torch.float32)
    r[1, 2, 3] = torch.nan
    out = launch.score_all_fused(r, c, None, None, mode="cosine", topk=2, dtype=torch.float32)
    wrong = 0
    for place, (x, y) in enumerate(zip(out, clean, strict=True)):
        x, y = (x, y) if place % 2 == 0 else (x.transpose(0, 1), y.transpose(0, 1))  # images first
        wrong += int((~x[1].isnan()).sum()) + int((~((x[[0, 2]] - y[[0, 2]]).abs() < 1e-6)).sum())
    return wrong


QUICK = (
    "the release's widths", "one region, one word", "topk beyond both", "cosine", "ties in scan", "in chunks",
    "half precision",
)  # fmt: skip


def in_the_interpreter(*names):
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__)), *names], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def errors():
    return in_the_interpreter(*QUICK)


@needs_triton
@pytest.mark.parametrize("name", QUICK)
def test_kernel_agrees_with_float64(name, errors):
    assert errors[name] <= TOLERANCE[CASES[name][-2]], name


@needs_triton
@pytest.mark.slow
def test_kernel_agrees_with_float64_on_all_sizes():
    found = in_the_interpreter(*CASES)
    assert all(found[name] <= TOLERANCE[case[-2]] for name, case in CASES.items()), found


@needs_triton
def test_what_is_not_finite_is_not_passed_over(errors):
    assert errors["not finite"] == 0


@pytest.mark.parametrize(("words", "masked", "expected"), [
    (24, False, [(-1, 32)]), (24, True, [(-1, 16), (16, 32)]), (5, True, [(-1, 16)]),
    (128, True, [(-1, 16), (16, 32), (32, 64), (64, 128)]),
])  # fmt: skip
def test_every_text_belongs_to_one_launch(words, masked, expected):
    mask = torch.ones(3, words, dtype=torch.bool) if masked else None
    given = launch._inputs(torch.randn(2, 36, 4), torch.randn(3, words, 4), None, mask, "scan", 10, torch.float32)
    launches = list(given.launches(Sizes(3, 2, words, 36, 10, 2), launch._PER_WARP))
    assert [(smallest, blocks.words) for _, blocks, smallest, _ in launches] == expected
    assert all(grid[0] == 3 and grid[1] * blocks.images >= 2 for grid, blocks, *_ in launches)


def test_tiles_hold_all_values_and_fit_a_program():
    for words in (16, 32, 64, 128):
        for r in range(1, launch.MAX_REGIONS + 1):
            blocks, warps = launch.blocks_for(words, r, launch._PER_WARP)
            assert blocks.words == words and blocks.regions >= r and warps in (1, 2, 4, 8, 16)
            assert all(n & (n - 1) == 0 for n in blocks)
            assert blocks.images * words * blocks.regions <= max(launch._TILE, words * blocks.regions)


def test_chunks_cover_every_pair_once(monkeypatch):
    for elements, rows in ((1, 1), (100, 12), (2000, 2000), (2**23, 2**11)):
        monkeypatch.setattr(launch, "_CHUNK", elements)
        monkeypatch.setattr(launch, "_CHUNK_ROWS", rows)
        seen = torch.zeros(7, 9)
        for t0, t1, i0, i1 in launch._chunks(7, 6, 9, 5):
            seen[t0:t1, i0:i1] += 1
            assert (t1 - t0) * 6 * (i1 - i0) * 5 <= max(elements, 30)
        assert (seen == 1).all()


def test_the_kernel_is_not_for_a_cpu_and_is_not_imported_there():
    x = torch.randn(2, 3, 4)
    assert not launch.kernel_applies(x, x, torch.float32)
    code = (
        "import sys, torch, hrem_layers\n"
        "x = torch.randn(2, 3, 4)\n"
        "hrem_layers.align_fragments(x, x)\n"
        "assert 'hrem_layers.alignment.gpu.kernel' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, tmp_path, monkeypatch):
    """To machine code, without a GPU at hand; the usual widths fit into registers."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from hrem_layers.alignment.gpu import kernel

    for words, regions in ((16, 36), (32, 36), (64, 100), (64, 256)):
        for function, per_warp in kernels(kernel):
            compiled = compile_for(function, capability, *launch.blocks_for(words, regions, per_warp))
            assert compiled.asm["cubin"]
            assert compiled.metadata.shared <= 48 * 1024


def kernels(module):
    return (module.score_kernel, launch._PER_WARP), (module.score_grad_kernel, launch._GRAD_PER_WARP)


def compile_for(function, capability, blocks, warps, mode="scan"):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    form = launch._inputs(torch.randn(1, 1, 1), torch.randn(1, 1, 1), None, None, mode, 1, torch.float32).form()
    constants = {"BLOCKS": blocks, "SMALLEST": 0, "FORM": form}
    types = {
        "products": Products("*fp32", "*i1", "constexpr", "constexpr", "constexpr"),
        "out": PairScores(*["*fp32"] * 4), "grad": PairScores(*["*fp32"] * 4), "sizes": Sizes(*["i32"] * 6),
        "grad_x": "*bf16", "extent": "*i32",
    }  # fmt: skip
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    absent = {(names.index("products"), place): None for place in (2, 3, 4)}
    source = ASTSource(
        function, signature, constexprs={**{(names.index(k),): x for k, x in constants.items()}, **absent},
        attrs={(names.index("products"), 0): [["tt.divisibility", 16]]},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_a_gpu(dtype):
    g = torch.Generator().manual_seed(0)
    dtype = getattr(torch, dtype)
    r, c = torch.randn(20, 36, 256, generator=g), torch.randn(24, 24, 256, generator=g)
    mask = torch.arange(24) < torch.randint(1, 25, (24, 1), generator=g)
    inputs = [x.to("cuda", dtype).requires_grad_() for x in (r, c)]
    assert launch.kernel_applies(*inputs, dtype)
    torch.cuda.set_sync_debug_mode("error")
    try:
        device_mask = mask.cuda()
        scores = align_fragments(*inputs, None, device_mask)
        sum(x.square().sum() for x in scores).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = [x.detach().cpu().double().requires_grad_() for x in inputs]
    expected = align_fragments(*exact, None, mask)
    sum(x.square().sum() for x in expected).backward()
    tolerance = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}[dtype]
    pairs = [*zip(scores, expected, strict=True), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    for x, y in pairs:
        assert (x.detach().cpu().double() - y.detach()).abs().max() <= tolerance * y.abs().max()


if __name__ == "__main__":
    found = {name: run_case(name, *CASES[name]) for name in sys.argv[1:]}
    print(json.dumps({**found, "not finite": not_finite_case()}))
