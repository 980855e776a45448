"""How the kernels are compiled, and the two operations that LLVM would otherwise compile to slow ones."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import numba
from numba.extending import intrinsic


def compiled(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The function compiled when first called, without Python's lock; what was compiled is kept in a cache on disk if
    there is a place for it.

    The cache holds what a function calls too, and is out of date if the function's own file changes: kernels that call
    one another stand in one file for that reason. After a change to :func:`larger` or :func:`smaller` delete it.
    """

    def compile_later(function: Callable[..., Any]) -> Callable[..., Any]:
        compiler = functools.partial(numba.njit, nogil=True, error_model="numpy", **options)
        try:
            return cast(Callable[..., Any], compiler(cache=True)(function))
        except RuntimeError:  # neither the package's folder nor the user's can be written to
            return cast(Callable[..., Any], compiler()(function))

    return compile_later


def _select(operator: str) -> Callable[..., Any]:
    """x if x ``operator`` y else y, of two numbers of one type that are not NaN.

    Written in Python, ``z[i] = x if x > z[i] else z[i]`` becomes a masked store, as nothing is to be written where the
    condition fails; on AMD's processors it takes several times as long as a maximum and a plain store. The
    promise that there is no NaN, and that 0 may be −0, lets LLVM see the maximum.
    """

    def typed(_context: Any, x: Any, y: Any) -> tuple[Any, Callable[..., Any]]:
        if x != y:
            raise numba.errors.TypingError(f"two numbers of one type were expected, got {x} and {y}")

        def generate(_: Any, builder: Any, _signature: Any, args: Any) -> Any:
            promises = ("nnan", "nsz")
            return builder.select(builder.fcmp_ordered(operator, *args, flags=promises), *args, flags=promises)

        return x(x, x), generate

    return cast(Callable[..., Any], intrinsic(typed))


larger, smaller = _select(">"), _select("<")
