"""What does every public name say to wrong arguments?

    python benchmarks/reliability/bad_input.py             # all cases, results into bad_input.json
    python benchmarks/reliability/bad_input.py --cases 200 # a seeded sample of them, results printed only

Each case is a good call with one argument replaced (bad_values.py), or the loss with a module of the caller's own that
returns the wrong thing. Right is a ValueError or TypeError that this package raises and that names the argument, or a
right result. Wrong is another exception, one from inside PyTorch or NumPy, one that does not name the argument; a
result where none can be right; a finite result of arguments that hold NaN or infinity; another result from a value
that means the same.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bad_values import D, batch, targets, values
from torch import Tensor

import hrem_layers
from hrem_layers import AssociationGraph, HREMLoss, TripletLoss

RESULTS = Path(__file__).resolve().parent / "bad_input.json"
PACKAGE = str(Path(hrem_layers.__file__).parent)


class Case(NamedTuple):
    target: str
    argument: str
    what: str
    expectation: str
    arguments: tuple[str, ...]
    call: Callable[[], object]
    good: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.target}, {self.argument} = {self.what}"


def cases() -> Iterator[Case]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for target in targets():
            good = target.good()
            for argument, kind in target.kinds.items():
                for what, expectation, value in values(kind, good.get(argument)):

                    def call(target=target, argument=argument, value=value) -> object:  # type: ignore[no-untyped-def]
                        return target.call(**{**target.good(), argument: value})

                    def plain(target=target) -> object:  # type: ignore[no-untyped-def]
                        return target.call(**target.good())

                    yield Case(target.name, argument, what, expectation, (*target.kinds, *good), call, plain)
        yield from returned()


def returned() -> Iterator[Case]:
    """Callables and modules of the caller's own that return the wrong thing."""
    wrong: list[Any] = [
        None, 3, "x", {}, (), (1,), (1, 2), [torch.ones(1)], torch.ones(3), torch.ones(()).long(), np.ones(4),
        (torch.ones(2, 2), torch.ones(2, 2)), torch.ones((), dtype=torch.complex64), torch.ones((), device="meta"),
        (torch.ones(4, 1), torch.ones(4, 1)), (torch.ones(4, D), None), torch.eye(2).to_sparse(), object(), Exception,
        (torch.ones(4, 1, device="meta"), torch.ones(4, 1, dtype=torch.bool)),
    ]  # fmt: skip

    class Returns(torch.nn.Module):
        def __init__(self, value: object) -> None:
            super().__init__()
            self.value = value

        def forward(self, *_: object, **__: object) -> object:
            return self.value

        def regularization(self, *_: object, **__: object) -> object:
            return self.value

    class Regularizes(AssociationGraph):
        def __init__(self, value: object) -> None:
            super().__init__()
            self.value = value

        def regularization(self, *_: object, **__: object) -> Any:
            return self.value

    makes = {
        "graph": lambda x: HREMLoss(D, graph=Returns(x)),
        "regularization": lambda x: HREMLoss(D, graph=Regularizes(x)),
        "interaction": lambda x: HREMLoss(D, interaction=Returns(x)),
        "pair_loss": lambda x: HREMLoss(D, pair_loss=lambda *_: x),
        "enhanced_pair_loss": lambda x: HREMLoss(D, enhanced_pair_loss=lambda *_: x),
        "cross_pair_loss": lambda x: HREMLoss(D, cross_pair_loss=lambda *_: x),
        "negative_sampling": lambda x: HREMLoss(D, pair_loss=TripletLoss(negative_sampling=lambda *_: x)),
        "alignment": lambda x: HREMLoss(D, graph=AssociationGraph(alignment=lambda *_: x)),
    }
    for argument, make in makes.items():
        for i, value in enumerate(wrong):

            def call(make=make, value=value) -> object:  # type: ignore[no-untyped-def]
                return make(value)(**batch())

            yield Case(
                f"HREMLoss with {argument} that returns", argument, f"wrong {i}", "error", (argument,), call, call
            )


def judge(case: Case) -> tuple[str, str]:
    """How it ended ("error", "result" or what is wrong), and the message if it is an exception."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            torch.manual_seed(0)
            result = case.call()
        except Exception as error:
            message = f"{type(error).__name__}: {error}".split("\n")[0][:200]
            if type(error) not in (TypeError, ValueError):
                return "other exception", message
            if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE):
                return "from inside", message
            # of two that do not fit together the message names either
            if not re.search(rf"\b({'|'.join(map(re.escape, case.arguments))})\b", str(error)):
                return "argument not named", message
            return ("right value refused", message) if case.expectation == "same" else ("error", message)
        if case.expectation == "error":
            return "accepted", ""
        if case.expectation == "nan" and finite(result):
            return "finite from non-finite", ""
        if case.expectation == "same":
            torch.manual_seed(0)
            if not same(result, case.good()):
                return "another result", ""
    return "result", ""


def leaves(x: object) -> Iterator[Any]:
    if isinstance(x, tuple | list):
        for y in x:
            yield from leaves(y)
    elif isinstance(x, torch.nn.Module):
        yield from (repr(x),)
    elif hasattr(x, "__dataclass_fields__"):
        yield from leaves(list(vars(x).values()))
    else:
        yield x


def finite(result: object) -> bool:
    return all(bool(torch.as_tensor(x).isfinite().all()) for x in leaves(result) if isinstance(x, Tensor | float))


def same(a: object, b: object) -> bool:
    both = list(zip(leaves(a), leaves(b), strict=True))
    return all(
        torch.allclose(x, y, rtol=1e-4, atol=1e-5, equal_nan=True) if isinstance(x, Tensor) else x == y for x, y in both
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=0, help="a sample of so many; 0: all")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    chosen = list(cases())
    if arguments.cases:
        chosen = random.Random(arguments.seed).sample(chosen, arguments.cases)
    outcomes, found = Counter(), []
    for case in chosen:
        outcome, message = judge(case)
        outcomes[outcome] += 1
        if outcome not in ("error", "result"):
            found.append({"case": str(case), "outcome": outcome, "message": message})
            print(f"{outcome}: {case}: {message}", file=sys.stderr)
    record = {"cases": len(chosen), "targets": len({case.target for case in chosen}), "outcomes": dict(outcomes),
              "found": found}  # fmt: skip
    if not arguments.cases:
        RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record["outcomes"]))
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
