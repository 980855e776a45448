"""What the tests stand on does what it says."""

from __future__ import annotations

import os

import pytest
import torch


def test_memory_that_nothing_has_written_is_nan() -> None:
    assert torch.empty(1000).isnan().all()
    assert torch.empty_like(torch.zeros(3, 4, dtype=torch.bfloat16)).isnan().all()
    assert torch.zeros(5).new_empty(7).isnan().all()
    assert (torch.empty(10, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()


@pytest.mark.parametrize("time", ["first", "again"])
def test_the_environment_is_the_same_for_every_test(time: str) -> None:
    assert "HREM_LEFT_BY_A_TEST" not in os.environ and os.environ.get("HOME") != "elsewhere", time
    os.environ |= {"HREM_LEFT_BY_A_TEST": "1", "HOME": "elsewhere"}
