"""What every test runs under: a fixed seed, and hypothesis searching the same examples each time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# the same examples on every machine and in every run; --hypothesis-profile=search looks for new ones
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile("repeatable")

# the tensors of the tests are small: more threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """torch.compile without what earlier tests left in it; what it compiles here must not compile twice."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()
