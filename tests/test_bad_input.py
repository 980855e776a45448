"""A sample of the wrong arguments of benchmarks/reliability/bad_input.py: each is refused by name, or gives a right
result."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks" / "reliability"))

bad_input = pytest.importorskip("bad_input")
CASES = list(bad_input.cases())
SAMPLE = random.Random(0).sample(CASES, 240)


def test_every_kind_of_case_is_there():
    assert len(CASES) >= 1000
    assert {case.expectation for case in CASES} == {"error", "same", "nan", "any"}
    # and in the sample nearly every public name
    assert len({case.target for case in SAMPLE}) >= 0.8 * len({case.target for case in CASES})


@pytest.mark.parametrize("case", SAMPLE, ids=[f"{i}-{case}"[:90] for i, case in enumerate(SAMPLE)])
def test_refused_by_name_or_right(case):
    assert bad_input.judge(case)[0] in ("error", "result"), bad_input.judge(case)


def a_case(expectation, call, good=None):
    return bad_input.Case("f", "x", "wrong", expectation, ("x",), call, good or call)


def raises(error):
    raise error


@pytest.mark.parametrize(
    ("case", "outcome"),
    [
        (a_case("error", lambda: 1.0), "accepted"),
        (a_case("error", lambda: raises(RuntimeError("x"))), "other exception"),
        (a_case("error", lambda: raises(ValueError("x"))), "from inside"),
        (a_case("nan", lambda: 1.0), "finite from non-finite"),
        (a_case("same", lambda: 1.0, lambda: 2.0), "another result"),
        (a_case("same", lambda: 1.0), "result"),
    ],
)
def test_the_judge_notices(case, outcome):
    assert bad_input.judge(case)[0] == outcome
