"""Every public name shows how it is used, and what it shows is true."""

from __future__ import annotations

import doctest
import inspect

import pytest
import torch

import hrem_layers


def examples(name: str) -> list[doctest.DocTest]:
    """Those in the docstring of a public name and, of a class, in those of its methods."""
    module = inspect.getmodule(getattr(hrem_layers, name)) or hrem_layers
    public = {other: getattr(hrem_layers, other) for other in hrem_layers.__all__}
    found = doctest.DocTestFinder().find(
        getattr(hrem_layers, name), name, module=False, globs={"torch": torch, **vars(module), **public}
    )
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", hrem_layers.__all__)
def test_examples(name: str) -> None:
    tests = examples(name)
    assert tests, f"{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        said: list[str] = []
        torch.manual_seed(0)
        runner.run(test, out=said.append)
        assert not runner.failures, "".join(said)
