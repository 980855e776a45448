"""What options may be: types for argparse that know their range, and say it when a value is out of it."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Integer:
    """Whole numbers from ``least`` to ``most``. ``zero``: what 0 means, where it is special."""

    least: int
    most: int = 10**9
    zero: str = ""

    def __call__(self, text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {self}, got {text!r}") from None
        return self.check(value)

    def check(self, value: Any) -> int:
        fits = isinstance(value, int) and not isinstance(value, bool)
        if not fits or not self.least <= value <= self.most:
            raise argparse.ArgumentTypeError(f"expected {self}, got {value!r}")
        return value

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}{f' (0: {self.zero})' if self.zero else ''}"


@dataclass(frozen=True)
class Number:
    """Finite numbers, from ``least`` or ``above``, to ``most`` or ``below``."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    zero: str = ""

    def __call__(self, text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {self}, got {text!r}") from None
        return self.check(value)

    def check(self, value: Any) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if (
            not fits
            or (self.least is not None and value < self.least)
            or (self.above is not None and value <= self.above)
            or (self.most is not None and value > self.most)
            or (self.below is not None and value >= self.below)
        ):
            raise argparse.ArgumentTypeError(f"expected {self}, got {value!r}")
        return value

    def __str__(self) -> str:
        parts = [
            f"from {self.least:g}" if self.least is not None else "",
            f"above {self.above:g}" if self.above is not None else "",
            f"to {self.most:g}" if self.most is not None else "",
            f"below {self.below:g}" if self.below is not None else "",
        ]
        return f"a finite number {', '.join(filter(None, parts))}{f' (0: {self.zero})' if self.zero else ''}"


@dataclass(frozen=True)
class Word:
    """Text that is not empty and, being part of file names, holds no separator."""

    def __call__(self, text: str) -> str:
        return self.check(text)

    def check(self, value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > 100 or any(c in value for c in "/\\\0"):
            raise argparse.ArgumentTypeError(f"expected {self}, got {value!r}")
        return value

    def __str__(self) -> str:
        return "a name without slashes"


def location(text: str) -> Path:
    """Of a file or folder, there or not. Empty text, mostly an unset variable of a shell, is none."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    try:
        path = Path(text).expanduser()
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not allowed, a zero byte, no such user
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"expected a path, got {text[:100]!r} ({reason})") from None
    return path


SHARE = Number(least=0, below=1)


def check_device(name: str) -> str:
    """``auto``, or a device that is there."""
    if name == "auto":
        return name
    try:
        device = torch.device(name)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"expected auto, cpu, cuda, cuda:1, ..., got {name!r}") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise argparse.ArgumentTypeError(f"{name!r} is not there: PyTorch finds {count or 'no'} CUDA device(s)")
        return name
    try:
        if float(torch.ones(1, device=device)) != 1:
            raise RuntimeError
    except Exception:  # of its own kind on each backend; "meta" has no values
        raise argparse.ArgumentTypeError(f"PyTorch cannot compute on {name!r} here") from None
    return name


def check_value(action: argparse.Action, value: Any) -> None:
    """Raises ArgumentTypeError unless ``value``, of a file, could have been given for the option ``action``."""
    check: Callable[[Any], Any] | None = getattr(action.type, "check", None)
    several = action.nargs in ("*", "+")
    if value is None and action.default is None:
        return
    if several and not isinstance(value, (list, tuple)):
        raise argparse.ArgumentTypeError(f"expected a list, got {value!r}")
    for one in value if several else [value]:
        if action.choices is not None:
            if one not in action.choices:
                raise argparse.ArgumentTypeError(f"expected one of {', '.join(action.choices)}, got {one!r}")
        elif isinstance(action.const, bool) or isinstance(action, argparse.BooleanOptionalAction):
            if not isinstance(one, bool):
                raise argparse.ArgumentTypeError(f"expected True or False, got {one!r}")
        elif check is not None:
            check(one)
        elif not isinstance(one, str):
            raise argparse.ArgumentTypeError(f"expected text, got {one!r}")
