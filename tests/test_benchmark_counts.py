"""What the benchmarks count, where the answer is known by hand."""

from __future__ import annotations

import torch
from support import tensors_peak_mb

from hrem_layers._core import neighbors


def test_peak_of_tensors_over_a_forward_and_backward_pass() -> None:
    x = torch.randn(500, 500, requires_grad=True)  # 1 MB

    def work() -> torch.Tensor:
        y = x.exp()  # kept for backward
        return torch.autograd.grad(y.sum(), x)[0]  # y times the sum's gradient, which is one number

    assert 2 <= tensors_peak_mb(work) < 2.001
    with torch.no_grad():
        assert 2 <= tensors_peak_mb(lambda: x.exp().square().mul(2)) < 2.001, "what is freed is not there"


def test_peak_of_tensors_sees_into_custom_operators() -> None:
    x, index = torch.randn(4096, 1, 64), torch.randint(4096, (4096, 16))
    chunk, result = neighbors._CPU_CHUNK * torch.get_num_threads() * 4 / 1e6, 4096 * 16 * 4 / 1e6
    peak = tensors_peak_mb(lambda: neighbors.neighbor_products(x, x, index))
    assert chunk + result <= peak < 2.01 * chunk + result, "at most the next one beside the one before"


def test_peak_of_tensors_knows_what_is_freed() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(500, 500)

    assert tensors_peak_mb(work) == 1
    assert tensors_peak_mb(lambda: None) == 0
