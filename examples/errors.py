"""Which errors are no bugs, and what to say of them."""

from __future__ import annotations

import re

import torch


def explain(error: Exception) -> str | None:
    """One line for people, if ``error`` is one that data, options or the machine bring; None if it is a bug."""
    text = str(error).strip() or type(error).__name__
    if "in DataLoader worker process" in text:  # the worker's traceback, the error itself in the last line
        text = re.sub(r"^[\w.]+: ", "", text.splitlines()[-1])
    elif isinstance(error, RuntimeError) and "DataLoader worker" in text:
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
