"""Counting the training calls of a loss on the host, so that a phase can be skipped and not only hidden.

Which phase it is must be known before anything is computed, without asking the device and without a number in the
traced code that changes from call to call (each would compile anew). Compiled code therefore looks at one bool,
``CallCounter.warming``, and counts by an operator, which runs as it stands and sets the bool when its time has come.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor

_keys = itertools.count()
# an operator takes no Python object: it finds its counter by number
_counters: weakref.WeakValueDictionary[int, CallCounter] = weakref.WeakValueDictionary()


class CallCounter:
    """Counts calls; ``warming`` while there were fewer than ``limit``. A copy counts for itself."""

    def __init__(self, limit: int) -> None:
        self.limit, self.calls = limit, 0
        self.key = self._register()

    def _register(self) -> int:
        self.set(self.limit, self.calls)
        key = next(_keys)
        _counters[key] = self
        return key

    def set(self, limit: int, calls: int) -> None:
        self.limit, self.calls, self.warming = limit, calls, calls < limit

    def advance(self) -> None:
        self.set(self.limit, self.calls + 1)

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "calls": self.calls}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.limit, self.calls = state["limit"], state["calls"]
        self.key = self._register()


@torch.library.custom_op("hrem_layers::count_call", mutates_args=("step",))
def count_call(step: Tensor, key: int) -> None:
    """Adds 1 to ``step`` (a scalar int64 tensor) and to the counter of that key."""
    step.add_(1)
    counter = _counters.get(key)
    if counter is not None:
        counter.advance()


@count_call.register_fake
def _(step: Tensor, key: int) -> None:
    return None


def recomputing() -> bool:
    """Whether this runs inside of a backward pass, as activation checkpointing does what it did before."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
