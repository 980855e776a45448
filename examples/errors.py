"""Which errors are no bugs, and what to say of them."""

from __future__ import annotations

import pickle
import re
import sys

import torch

# What comes out of the pipe to a data worker that ends in the middle of a sentence. Files and other processes of the
# group that are cut off are told of as DataError, Damaged and PeerLost.
CUT_OFF = (ConnectionResetError, ConnectionRefusedError, EOFError, pickle.UnpicklingError)


def explain(error: Exception) -> str | None:
    """One line for people, if ``error`` is one that data, options or the machine bring; None if it is a bug."""
    text = str(error).strip() or type(error).__name__
    if "in DataLoader worker process" in text:  # the worker's traceback, the error itself in the last line
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    elif type(error) in CUT_OFF or (isinstance(error, RuntimeError) and "DataLoader worker" in text):
        how = re.search(r"killed by signal: ([\w ]+)", text)
        return (
            f"a process that reads the data ended unexpectedly{f' ({how[1].strip()})' if how else ''}: killed, or out "
            "of memory or shared memory; fewer --num-workers need less"
        )
    elif isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
        r"can't allocate memory|out of memory", text
    ):
        return f"out of memory: a smaller --batch-size, or --candidates, needs less ({text.splitlines()[0]})"
    elif not isinstance(error, (ValueError, OSError, ImportError, FloatingPointError)):
        return None
    return " ".join(text.split("\n"))


def let_idle_workers_die() -> None:
    """From here on says nothing of a data worker that ends unexpectedly while it is being dismissed: it has done its
    work.

    PyTorch raises where the main process is when the news comes, there in a ``__del__``, whose exceptions Python prints
    and forgets. While there is something to read, the same news ends the run.
    """
    before = sys.unraisablehook

    def hook(what: sys.UnraisableHookArgs) -> None:
        if not (isinstance(what.exc_value, RuntimeError) and "DataLoader worker" in str(what.exc_value)):
            before(what)

    sys.unraisablehook = hook
