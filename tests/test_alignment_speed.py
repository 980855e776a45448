"""The alignment stays within a factor of a bare matrix product. Ratios only, of processor time on one thread: what else
runs on the machine matters little to it. The bounds leave room for noise; docs/performance.md has the real figures.
"""

from __future__ import annotations

import time

import pytest
import torch

from hrem_layers import AssociationGraph, align_fragments

N, REGIONS, SHORTEST, LONGEST, DIM = 64, 36, 8, 24, 512
TRIES, ROUNDS = 3, 5


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batch():
    lengths = torch.randint(SHORTEST, LONGEST + 1, (N, 1))
    images, texts = torch.randn(N, REGIONS, DIM), torch.randn(N, LONGEST, DIM)
    return images, texts, torch.arange(LONGEST) < lengths


def best_ratio(work, matmul):
    """Of a few rounds in turn, the best time of ``work`` over that of ``matmul``."""
    seconds = {work: [], matmul: []}
    for run in (work, matmul):
        run()
    for _ in range(ROUNDS):
        for run, found in seconds.items():
            start = time.process_time()
            run()
            found.append(time.process_time() - start)
    return min(seconds[work]) / min(seconds[matmul])


def check(work, images, texts, mask, bound):
    words, regions = texts[mask], images.flatten(0, 1)
    ratios = []
    for _ in range(TRIES):
        ratios.append(best_ratio(work, lambda: words @ regions.t()))
        if ratios[-1] <= bound:
            return
    pytest.fail(f"took {', '.join(f'{x:.2f}' for x in ratios)} times the bare product, {bound} are allowed")


def test_graph_forward():
    images, texts, mask = batch()
    embeddings = torch.randn(2, N, DIM)
    graph = AssociationGraph()

    @torch.no_grad()
    def forward():
        graph(*embeddings, images, texts, None, mask)

    check(forward, images, texts, mask, 2.5)


def test_alignment_forward_and_backward():
    images, texts, mask = batch()

    def step():
        inputs = [x.detach().requires_grad_() for x in (images, texts)]
        sum(x.square().sum() for x in align_fragments(*inputs, None, mask)).backward()

    check(step, images, texts, mask, 6.5)
