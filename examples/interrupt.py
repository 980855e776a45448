"""Ctrl-C in one line from the first moment: loading PyTorch takes seconds in which it would end in a traceback."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def _at_once(*_: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(130)


def as_exception() -> None:
    """From here on as usual: KeyboardInterrupt in the main thread."""
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is _at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def ignore() -> None:
    """From here on no Ctrl-C counts, nor the end of a data worker."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    ignore_workers()


def ignore_workers() -> None:
    """From here on no data worker that ends is told of: PyTorch would raise in the middle of whatever comes next."""
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@contextmanager
def deferred() -> Iterator[None]:
    """A Ctrl-C, or the end of a data worker, takes effect at the end.

    An exception in the middle of a write by PyTorch's own code would come out as a file that cannot be written, or
    abort the process.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    met: dict[int, FrameType | None] = {}
    signals = [signal.SIGINT, *([signal.SIGCHLD] if hasattr(signal, "SIGCHLD") else [])]
    # None: not set by Python, so it cannot be put back, and raises nothing either
    before = {number: handler for number in signals if (handler := signal.getsignal(number)) is not None}
    for number in before:
        signal.signal(number, lambda number, frame: met.setdefault(number, frame))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in met.items():
        handler = before[number]
        if callable(handler):
            handler(number, frame)


if threading.current_thread() is threading.main_thread():
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker that imports the script: the main process ends it
    elif os.path.basename(sys.argv[0]) == "flickr30k.py":  # the program, not a test or another program
        signal.signal(signal.SIGINT, _at_once)
