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
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def deferred() -> Iterator[None]:
    """A Ctrl-C inside takes effect at the end: an exception in the middle of a write by PyTorch's own code would come
    out as a file that cannot be written, or end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[tuple[int, FrameType | None]] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before):
        before(*pressed[0])


if threading.current_thread() is threading.main_thread():
    if multiprocessing.parent_process() is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a worker that imports the script: the main process ends it
    elif os.path.basename(sys.argv[0]) == "flickr30k.py":  # the program, not a test or another program
        signal.signal(signal.SIGINT, _at_once)
