"""What every test runs under: a fixed seed, and hypothesis searching the same examples each time."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from hrem_layers.alignment import op
from hrem_layers.alignment.cpu import launch

# the same examples on every machine and in every run; --hypothesis-profile=search looks for new ones
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("search", deadline=None)
settings.load_profile("repeatable")

# the tensors of the tests are small: more threads would only wait for each other
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Each test gets the environment that the run began with. A launcher's variables (``RANK``, ``MASTER_PORT``) that a
    block of the docs or a framework sets would otherwise reach the programs that later tests start, which then wait
    for processes that nobody starts."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def _uninitialized_is_nan() -> Iterator[None]:
    """``torch.empty`` gives NaN (integers: their maximum) instead of what the memory held, so that a place which is
    read before it is written shows. PyTorch fills only in deterministic mode; what that says of operators without a
    deterministic form is none of this fixture's business and ignored in pyproject.toml."""
    fill, mode = torch.utils.deterministic.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(params=["compiled", "packed"])
def cpu_alignment(request, monkeypatch) -> str:
    """Both ways to align all pairs on a CPU, with Numba and without."""
    if request.param == "packed":
        monkeypatch.setattr(op, "compiled_applies", lambda *_: False)
    elif not launch._has_numba():
        pytest.skip("needs Numba, of the extra cpu")
    return request.param


@pytest.fixture
def fresh_compiler():
    """torch.compile without what earlier tests left in it; what it compiles here must not compile twice."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()
